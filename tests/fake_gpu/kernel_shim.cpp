// Runs the kernel of a .cu file on the processor, thread after thread. SOURCE is the path of the file, in quotes.
#define __global__
#define __device__
struct Index { unsigned x, y; };
static thread_local Index gridDim, blockDim, blockIdx, threadIdx;
#include SOURCE

extern "C" unsigned long resample_argument_size() { return sizeof(Pass); }

extern "C" void run_resample(const Pass* pass, unsigned gx, unsigned gy, unsigned bx, unsigned by) {
    gridDim = {gx, gy};
    blockDim = {bx, by};
    for (blockIdx.y = 0; blockIdx.y < gy; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < gx; blockIdx.x++)
            for (threadIdx.y = 0; threadIdx.y < by; threadIdx.y++)
                for (threadIdx.x = 0; threadIdx.x < bx; threadIdx.x++) resample(*pass);
}
