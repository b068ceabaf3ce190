// Dense features of a bundle from C++, over ONNX Runtime's C API and by docs/bundle-format.md alone.
//
//     dense_features BUNDLE IMAGE.ppm OUTPUT.npy [NAME [HxW]]
//
// IMAGE is a binary PPM (P6, 8 bits). NAME is an output of the bundle, "features" by default; HxW is for bundles of
// several sizes. The resize is that of Pillow up to 12, bit for bit; 13 takes the passes in the other order where the
// height shrinks much more. Left out: hashes (sha256sum compares them), the exam, rotary tables of several sizes.
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

using Json = nlohmann::json;
using Shape = std::vector<int64_t>;

static const OrtApi* ort = nullptr;

static void check(OrtStatus* status) {
    if (status != nullptr) throw std::runtime_error(std::string("ONNX Runtime: ") + ort->GetErrorMessage(status));
}

static int64_t count(const Shape& shape) {
    return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<int64_t>());
}

static std::ifstream open(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + " cannot be read");
    return file;
}

struct Image { int height, width; std::vector<uint8_t> pixels; };  // (height, width, 3)

static Image read_ppm(const std::string& path) {
    std::ifstream file = open(path);
    std::string magic(2, ' ');
    file.read(&magic[0], 2);
    int fields[3] = {0, 0, 0};  // width, height, largest value
    for (int& field : fields) {
        while ((file >> std::ws).peek() == '#') file.ignore(1 << 20, '\n');  // a comment
        file >> field;
    }
    const auto [width, height, most] = fields;
    if (magic != "P6" || most != 255 || std::min(width, height) < 1 || int64_t(width) * height > 1 << 28)
        throw std::runtime_error(path + " is no binary PPM of 8 bits (P6, 255)");
    file.get();  // one white space
    Image image{height, width, std::vector<uint8_t>(size_t(3) * width * height)};
    if (!file.read(reinterpret_cast<char*>(image.pixels.data()), image.pixels.size()))
        throw std::runtime_error(path + " is truncated");
    return image;
}

// An output of an axis is the weighted sum of neighbouring inputs, from `first`.
struct Taps { int first; std::vector<double> weights; };

// Antialiased resampling with half-pixel centres; the kernel is wider for shrinking. Pillow's and torch's are equal.
static std::vector<Taps> taps(int before, int after, const std::string& kernel) {
    const double support = kernel == "lanczos" ? 3 : kernel == "bicubic" ? 2 : 1, pi = std::acos(-1.0);
    auto sinc = [pi](double x) { return x == 0 ? 1.0 : std::sin(pi * x) / (pi * x); };
    auto value = [&](double x) {
        x = std::abs(x);
        if (x >= support) return 0.0;
        if (kernel == "lanczos") return sinc(x) * sinc(x / 3);
        if (kernel == "bilinear") return 1 - x;
        return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : ((-0.5 * x + 2.5) * x - 4) * x + 2;
    };
    const double scale = double(before) / after, widen = std::max(scale, 1.0);
    std::vector<Taps> all;
    for (int i = 0; i < after; ++i) {
        const double centre = scale * (i + 0.5);
        const int first = std::max(int(centre - support * widen + 0.5), 0);
        const int last = std::min(int(centre + support * widen + 0.5), before);
        Taps one{first, {}};
        for (int j = first; j < last; ++j) one.weights.push_back(value((j - centre + 0.5) / widen));
        const double sum = std::accumulate(one.weights.begin(), one.weights.end(), 0.0);
        for (double& weight : one.weights) weight /= sum;
        all.push_back(one);
    }
    return all;
}

// One pass of Pillow's resize over 8-bit channels: integers with 22 bits of fraction, rounded to grey levels.
// `down` resizes columns, otherwise rows.
static Image pass(const Image& from, int after, const std::string& kernel, bool down) {
    const int before = down ? from.height : from.width, lines = down ? from.width : from.height;
    if (before == after) return from;
    Image to{down ? after : lines, down ? lines : after, std::vector<uint8_t>(size_t(3) * lines * after)};
    // The steps to the next input of a sum and to the next line; then the same in the result.
    const int64_t along = down ? 3 * lines : 3, across = down ? 3 : 3 * before, to_across = down ? 3 : 3 * after;
    const std::vector<Taps> axis = taps(before, after, kernel);
    for (int i = 0; i < after; ++i) {
        std::vector<int> weights;
        for (double w : axis[i].weights) weights.push_back(int(w * (1 << 22) + (w < 0 ? -0.5 : 0.5)));
        for (int line = 0; line < lines; ++line)
            for (int c = 0; c < 3; ++c) {
                const uint8_t* next = &from.pixels[line * across + axis[i].first * along + c];
                int sum = 1 << 21;
                for (size_t k = 0; k < weights.size(); ++k) sum += weights[k] * next[k * along];
                to.pixels[line * to_across + i * along + c] = uint8_t(std::clamp(sum >> 22, 0, 255));
            }
    }
    return to;
}

// The section "Preprocessing" of the format.
static Image fit(const Image& image, int height, int width, const Json& steps) {
    const double share = steps.at("crop_pct");
    int full_height = int(std::floor(height / share)), full_width = int(std::floor(width / share));
    if (steps.at("crop_mode") == "center") {  // the aspect stays: the short side, or the tighter one, fills the input
        const double h = image.height, w = image.width, side = full_height;
        const double ratio = std::min(h / full_height, w / full_width);
        const bool square = height == width;
        full_height = int(!square ? std::nearbyint(h / ratio) : w <= h ? side * h / w : side);
        full_width = int(!square ? std::nearbyint(w / ratio) : w <= h ? side : side * w / h);
    }
    const std::string kernel = steps.at("interpolation");
    if (kernel == "nearest") throw std::runtime_error("the interpolation nearest is not in this example");
    const Image full = pass(pass(image, full_width, kernel, false), full_height, kernel, true);
    const int top = int(std::nearbyint((full_height - height) / 2.0));
    const int left = int(std::nearbyint((full_width - width) / 2.0));
    Image part{height, width, {}};
    for (int y = top; y < top + height; ++y) {
        const auto row = full.pixels.begin() + 3 * (int64_t(y) * full_width + left);
        part.pixels.insert(part.pixels.end(), row, row + 3 * width);
    }
    return part;
}

// `pos_embed.npy`, float32 (gh, gw, C), at a grid (rows, columns): the section "Position embedding".
static std::vector<float> positions(const std::string& path, Shape from, int rows, int columns) {
    std::ifstream file = open(path);
    std::vector<float> base(count(from)), out;
    file.seekg(-4 * int64_t(base.size()), std::ios::end);  // behind the header; the manifest says the shape
    if (!file.read(reinterpret_cast<char*>(base.data()), 4 * base.size()))
        throw std::runtime_error(path + " is truncated");
    if (from[0] == rows && from[1] == columns) return base;
    const auto down = taps(int(from[0]), rows, "bicubic"), right = taps(int(from[1]), columns, "bicubic");
    for (const Taps& y : down)
        for (const Taps& x : right)
            for (int64_t c = 0; c < from[2]; ++c) {
                double sum = 0;
                for (size_t j = 0; j < y.weights.size(); ++j)
                    for (size_t i = 0; i < x.weights.size(); ++i)
                        sum += y.weights[j] * x.weights[i] *
                               base[((y.first + j) * from[1] + x.first + i) * from[2] + c];
                out.push_back(float(sum));
            }
    return out;
}

static void write_npy(const std::string& path, const char* type, const Shape& shape, const void* data, size_t bytes) {
    std::string sides, head;
    for (int64_t side : shape) sides += std::to_string(side) + ", ";
    head = std::string("{'descr': '") + type + "', 'fortran_order': False, 'shape': (" + sides + "), }";
    head += std::string(63 - (10 + head.size()) % 64, ' ') + "\n";
    std::ofstream file(path, std::ios::binary);
    file << "\x93NUMPY\x01" << '\0' << char(head.size() & 255) << char(head.size() >> 8) << head;
    file.write(static_cast<const char*>(data), bytes);
    if (!file.flush()) throw std::runtime_error(path + " cannot be written");
}

template <typename T>
static OrtValue* tensor(OrtMemoryInfo* memory, std::vector<T>& data, const Shape& shape) {
    const auto type = sizeof(T) == 1 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    OrtValue* value = nullptr;
    check(ort->CreateTensorWithDataAsOrtValue(memory, data.data(), data.size() * sizeof(T), shape.data(), shape.size(),
                                              type, &value));
    return value;
}

// Whether the bundle serves a size: a size of its list, or whole patches within its range.
static bool served(const Json& sizes, const Json& patch, int height, int width) {
    const Json& known = sizes.at("sizes");
    if (sizes.at("mode") != "range") return std::count(known.begin(), known.end(), Json{height, width}) > 0;
    const bool whole = height % int(patch.at(0)) == 0 && width % int(patch.at(1)) == 0;
    return whole && known.at(0).at(0) <= height && known.at(0).at(1) <= width && height <= known.at(2).at(0) &&
           width <= known.at(2).at(1);
}

static void run(const std::string& folder, const std::string& photo, const std::string& output, const std::string& name,
                const std::string& asked) {
    const Json manifest = Json::parse(open(folder + "/manifest.json"));
    if (manifest.at("format") > 4) throw std::runtime_error("the bundle has a newer format than 4");
    if (!manifest.at("outputs").contains(name)) throw std::runtime_error("the bundle has no output " + name);
    if (manifest.at("inputs").contains("rotary")) throw std::runtime_error("rotary tables are not in this example");
    const Json &sizes = manifest.at("sizes"), &model = manifest.at("model"), &patch = model.at("patch");
    const Json& own = sizes.at("sizes").at(sizes.at("mode") == "range" ? 1 : 0);
    int height = own.at(0), width = own.at(1);
    if (!asked.empty() && (std::sscanf(asked.c_str(), "%dx%d", &height, &width) != 2 ||
                           !served(sizes, patch, height, width)))
        throw std::runtime_error("got the size " + asked + ", expected HxW of the manifest's sizes");
    const int64_t batch = manifest.at("batches").at("lowest");  // a larger lowest batch is filled with copies
    const Image image = fit(read_ppm(photo), height, width, manifest.at("preprocess"));
    std::vector<uint8_t> pixels;
    for (int64_t b = 0; b < batch; ++b) pixels.insert(pixels.end(), image.pixels.begin(), image.pixels.end());

    OrtEnv* env; OrtSessionOptions* options; OrtSession* session; OrtMemoryInfo* memory;
    check(ort->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "dense_features", &env));
    check(ort->CreateSessionOptions(&options));
    check(ort->CreateSession(env, (folder + "/model.onnx").c_str(), options, &session));
    check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    std::vector<const char*> names = {"image"};
    const Shape shape = {batch, height, width, 3};
    std::vector<OrtValue*> inputs = {tensor(memory, pixels, shape)};
    std::vector<float> table;
    if (manifest.at("inputs").contains("pos_embed")) {
        const Shape base = {model.at("grid").at(0), model.at("grid").at(1), model.at("width")};
        table = positions(folder + "/pos_embed.npy", base, height / int(patch.at(0)), width / int(patch.at(1)));
        names.push_back("pos_embed");
        inputs.push_back(tensor(memory, table, {1, int64_t(table.size()) / base[2], base[2]}));
    }
    const char* wanted[] = {name.c_str()};
    OrtValue* result = nullptr;
    check(ort->Run(session, nullptr, names.data(), inputs.data(), inputs.size(), wanted, 1, &result));

    OrtTensorTypeAndShapeInfo* info; size_t rank; void* data;
    check(ort->GetTensorTypeAndShape(result, &info));
    check(ort->GetDimensionsCount(info, &rank));
    Shape given(rank);
    check(ort->GetDimensions(info, given.data(), rank));
    check(ort->GetTensorMutableData(result, &data));
    given[0] = 1;  // without the copies
    const std::string type = manifest.at("outputs").at(name).at("dtype");
    const int bytes = type == "float16" ? 2 : type == "uint8" ? 1 : 4;
    write_npy(output, bytes == 2 ? "<f2" : bytes == 1 ? "|u1" : "<f4", given, data, count(given) * bytes);
    // The process ends here. A program that goes on keeps `session` for its next images, and gives everything back by
    // ReleaseValue, ReleaseTensorTypeAndShapeInfo, ReleaseMemoryInfo, ReleaseSession, ReleaseSessionOptions and so on.
}

int main(int argc, char** argv) {
    try {
        if (argc < 4 || argc > 6) throw std::runtime_error("expected BUNDLE IMAGE.ppm OUTPUT.npy [NAME [HxW]]");
        ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
        if (ort == nullptr) throw std::runtime_error("the library is older than the header it was compiled with");
        run(argv[1], argv[2], argv[3], argc > 4 ? argv[4] : "features", argc > 5 ? argv[5] : "");
        return 0;
    } catch (const std::exception& error) {
        std::cerr << "dense_features: " << error.what() << "\n";
        return 1;
    }
}
