// One pass of a resize along one axis, in the integers of Pillow's ImagingResampleHorizontal_8bpc and _Vertical_8bpc:
// a sum of neighbours times weights of 22 bits, rounded to whole grey levels. Two passes make a resize.
//
// The first pass reads a camera's frame (RGB or BGR pixels of any step, or NV12), the second one the first pass's rows.
// Each thread computes a pixel of the target. This file is compiled by NVRTC for GPUs and, with 20 lines around it,
// by a C++ compiler in the tests; so it includes nothing. `Pass` has the layout of the class of that name in kernel.py.

struct Pass {
    const unsigned char* source;  // pixels of three channels, or NV12's luma
    const unsigned char* chroma;  // NV12's chroma; null for pixels
    unsigned char* target;        // pixels of three bytes
    const int* table;             // rows of `outputs` entries: first input, inputs, and one weight after the other
    long long source_pitch;       // bytes from row to row
    long long chroma_pitch;
    long long target_pitch;
    int source_step;  // bytes from pixel to pixel
    int along_x;      // the axis that is resized: 1 for x, 0 for y
    int first;        // the first pixel of the source along the other axis
    int columns, rows;             // pixels of the target
    int left, top, width, height;  // where the image lies in the target; the rest gets `fill`
    int swap;                      // write the channels in the reverse order
    int fill[3];
    int luma_zero, luma, red_v, green_u, green_v, blue_u;  // NV12 to RGB, times 65536 but the zero
};

__device__ static int clip(int value) { return value < 0 ? 0 : value > 255 ? 255 : value; }

__device__ static void read_pixel(const Pass& pass, int x, int y, int* channels) {
    const unsigned char* pixel = pass.source + y * pass.source_pitch + (long long)x * pass.source_step;
    if (!pass.chroma) {
        for (int channel = 0; channel < 3; channel++) channels[channel] = pixel[channel];
        return;
    }
    // Each pair of chroma serves two by two pixels.
    const unsigned char* pair = pass.chroma + (y / 2) * pass.chroma_pitch + x / 2 * 2;
    int luma = (pixel[0] - pass.luma_zero) * pass.luma + (1 << 15), u = pair[0] - 128, v = pair[1] - 128;
    channels[0] = clip((luma + pass.red_v * v) >> 16);
    channels[1] = clip((luma + pass.green_u * u + pass.green_v * v) >> 16);
    channels[2] = clip((luma + pass.blue_u * u) >> 16);
}

extern "C" __global__ void resample(const Pass pass) {
    int column = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y * blockDim.y + threadIdx.y;
    if (column >= pass.columns || row >= pass.rows) return;
    unsigned char* out = pass.target + row * pass.target_pitch + 3LL * column;
    int x = column - pass.left, y = row - pass.top;
    if (x < 0 || y < 0 || x >= pass.width || y >= pass.height) {
        for (int channel = 0; channel < 3; channel++) out[channel] = (unsigned char)pass.fill[channel];
        return;
    }
    int outputs = pass.along_x ? pass.width : pass.height;
    const int* entry = pass.table + (pass.along_x ? x : y);
    int begin = entry[0], count = entry[outputs];
    int sums[3] = {1 << 21, 1 << 21, 1 << 21}, channels[3];
    for (int i = 0; i < count; i++) {
        int weight = entry[(2 + i) * outputs];
        if (pass.along_x)
            read_pixel(pass, begin + i, y + pass.first, channels);
        else
            read_pixel(pass, x + pass.first, begin + i, channels);
        for (int channel = 0; channel < 3; channel++) sums[channel] += channels[channel] * weight;
    }
    for (int channel = 0; channel < 3; channel++)
        out[pass.swap ? 2 - channel : channel] = (unsigned char)clip(sums[channel] >> 22);
}
