// Training and evaluation of multilayer perceptrons of which only some weights are there, on inputs of which many numbers
// may be zero. Rectified units; the last layer is linear, and scored by cross entropy. SGD and Adam.
//
// Kept weights alone are stored: for every row of a layer's matrix the places within it, in order, and the values. A row is
// a unit; in the first layer, an input, so that those that are zero in all examples of a block are passed over.
// Two ways to multiply:
//   sparse  one weight meets the 64 examples of a block, which lie side by side: work falls with the kept weights;
//   dense   an input that is not zero meets all units, which lie side by side in a dense copy of the weights: work falls
//           with the inputs that are zero. For the first layer only, where images have them.
//
// A step is bound by memory: weights and moments of a lane are larger than a core's own cache. So what has a dense copy is
// updated row by row, as soon as a row's gradient is there, which is never stored.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

template <typename T>
using Vec __attribute__((vector_size(32), aligned(sizeof(T)), may_alias)) = T;

constexpr int64_t kExamples = 64;  // of a block: eight registers of float

template <typename T>
constexpr int64_t kWidth = 32 / sizeof(T);

// Units of a dense copy, filled up to whole groups of four registers.
template <typename T>
constexpr int64_t padded(int64_t units) {
    const int64_t group = 4 * kWidth<T>;
    return (units + group - 1) / group * group;
}

inline float total(const Vec<float>& v) {
    const auto four = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
    const auto two = four + __builtin_shufflevector(four, four, 2, 3, 0, 1);
    return two[0] + two[1];
}

inline double total(const Vec<double>& v) {
    const auto two = __builtin_shufflevector(v, v, 0, 1) + __builtin_shufflevector(v, v, 2, 3);
    return two[0] + two[1];
}

// Examples by row, without their zeros.
template <typename T>
struct Examples {
    const int64_t* starts;
    const int32_t* places;
    const T* values;
    const int64_t* classes;
    const int64_t* picks;  // which, or null: all in order

    int64_t at(int64_t n) const { return picks ? picks[n] : n; }

    // Asks for a block's examples, which lie anywhere in memory, all at once: one after another each would be waited for.
    void fetch(int64_t first, int64_t count) const {
        for (int64_t n = first; n < first + count; ++n) {
            const int64_t begin = starts[at(n)], end = starts[at(n) + 1];
            for (int64_t k = begin; k < end + 15; k += 16) {  // a cache line of 64 bytes
                __builtin_prefetch(places + std::min(k, end));
                __builtin_prefetch(values + std::min(k, end));
            }
        }
    }
};

// How weights follow their gradient. Adam as torch.optim.Adam and AdamW, SGD with momentum as torch.optim.SGD.
template <typename T>
struct Rule {
    T lr, beta1, beta2, eps, decay, unbias1, unbias2;  // unbias: what moments are multiplied by
    int64_t adam, decoupled;
    T* values;
    T* mean;    // or SGD's momentum
    T* square;  // Adam's

    T apply(int64_t k, T g) const {
        T w = values[k];
        if (decoupled)
            w -= lr * decay * w;
        else
            g += decay * w;
        if (adam) {
            const T m = mean[k] = beta1 * mean[k] + (1 - beta1) * g;
            const T s = square[k] = beta2 * square[k] + (1 - beta2) * g * g;
            w -= lr * (m * unbias1) / (std::sqrt(s * unbias2) + eps);
        } else {
            w -= lr * (mean[k] = beta1 * mean[k] + g);
        }
        return values[k] = w;
    }

    // With the choices outside of the loops, which then become vector instructions.
    void update(int64_t begin, int64_t end, const T* slopes) const {
        Rule own = *this;
        if (adam && !decoupled) {
            own.adam = 1, own.decoupled = 0;
            for (int64_t k = begin; k < end; ++k) own.apply(k, slopes[k]);
        } else if (adam) {
            own.adam = 1, own.decoupled = 1;
            for (int64_t k = begin; k < end; ++k) own.apply(k, slopes[k]);
        } else {
            own.adam = 0, own.decoupled = 0;
            for (int64_t k = begin; k < end; ++k) own.apply(k, slopes[k]);
        }
    }
};

struct Layer {
    int64_t inputs, units;
    const int64_t* starts;  // where a row's weights begin
    const int32_t* places;  // of all lanes and layers
    int64_t bias;           // where the layer's biases begin among the values
};

// --- sparse: x and y are [units, 64] ---

template <typename T>
void forward(const Layer& layer, const T* values, const T* x, T* y, bool rectify) {
    constexpr int count = kExamples / kWidth<T>;
    for (int64_t unit = 0; unit < layer.units; ++unit) {
        Vec<T> sum[count];
        for (int v = 0; v < count; ++v) sum[v] = Vec<T>{} + values[layer.bias + unit];
        for (int64_t k = layer.starts[unit]; k < layer.starts[unit + 1]; ++k) {
            const auto* from = reinterpret_cast<const Vec<T>*>(x + int64_t(layer.places[k]) * kExamples);
            const T w = values[k];
            for (int v = 0; v < count; ++v) sum[v] += w * from[v];
        }
        auto* to = reinterpret_cast<Vec<T>*>(y + unit * kExamples);
        for (int v = 0; v < count; ++v) to[v] = rectify ? (sum[v] > 0 ? sum[v] : Vec<T>{}) : sum[v];
    }
}

// Adds to the gradient by weights and by x; dy is the gradient by y.
template <typename T>
void backward(const Layer& layer, const T* values, const T* x, const T* dy, T* slopes, T* dx) {
    constexpr int count = kExamples / kWidth<T>;
    for (int64_t unit = 0; unit < layer.units; ++unit) {
        Vec<T> slope[count];
        const auto* from = reinterpret_cast<const Vec<T>*>(dy + unit * kExamples);
        for (int v = 0; v < count; ++v) slope[v] = from[v];
        for (int64_t k = layer.starts[unit]; k < layer.starts[unit + 1]; ++k) {
            const int64_t place = int64_t(layer.places[k]) * kExamples;
            const auto* input = reinterpret_cast<const Vec<T>*>(x + place);
            Vec<T> even = slope[0] * input[0], odd = slope[1] * input[1];
            for (int v = 2; v < count; v += 2) {
                even += slope[v] * input[v];
                odd += slope[v + 1] * input[v + 1];
            }
            slopes[k] += total(Vec<T>(even + odd));
            auto* back = reinterpret_cast<Vec<T>*>(dx + place);
            const T w = values[k];
            for (int v = 0; v < count; ++v) back[v] += w * slope[v];
        }
    }
}

// The same for rows that are inputs: x is one input's [64].
template <typename T>
void forward_of_input(const Layer& layer, int64_t input, const T* values, const T* x, T* y) {
    constexpr int count = kExamples / kWidth<T>;
    Vec<T> held[count];
    for (int v = 0; v < count; ++v) held[v] = reinterpret_cast<const Vec<T>*>(x)[v];
    for (int64_t k = layer.starts[input]; k < layer.starts[input + 1]; ++k) {
        auto* to = reinterpret_cast<Vec<T>*>(y + int64_t(layer.places[k]) * kExamples);
        const T w = values[k];
        for (int v = 0; v < count; ++v) to[v] += w * held[v];
    }
}

template <typename T>
void backward_of_input(const Layer& layer, int64_t input, const T* x, const T* dy, T* slopes) {
    constexpr int count = kExamples / kWidth<T>;
    Vec<T> held[count];
    for (int v = 0; v < count; ++v) held[v] = reinterpret_cast<const Vec<T>*>(x)[v];
    for (int64_t k = layer.starts[input]; k < layer.starts[input + 1]; ++k) {
        const auto* from = reinterpret_cast<const Vec<T>*>(dy + int64_t(layer.places[k]) * kExamples);
        Vec<T> even = held[0] * from[0], odd = held[1] * from[1];
        for (int v = 2; v < count; v += 2) {
            even += held[v] * from[v];
            odd += held[v + 1] * from[v + 1];
        }
        slopes[k] += total(Vec<T>(even + odd));
    }
}

// --- dense: y and dy are [64, padded units] ---

template <typename T, int N>
void gather(int64_t first, int64_t last, const int32_t* places, const T* factors, const T* rows, int64_t width, T* sum) {
    Vec<T> kept[N];
    auto* held = reinterpret_cast<Vec<T>*>(sum);
    for (int v = 0; v < N; ++v) kept[v] = held[v];
    for (int64_t k = first; k < last; ++k) {
        const auto* from = reinterpret_cast<const Vec<T>*>(rows + int64_t(places[k]) * width);
        const T factor = factors[k];
        for (int v = 0; v < N; ++v) kept[v] += factor * from[v];
    }
    for (int v = 0; v < N; ++v) held[v] = kept[v];
}

// sum [width] += factors[k] * rows[places[k]] over k: columns [begin, end) of it.
template <typename T>
void gather_some(int64_t begin, int64_t end, int64_t first, int64_t last, const int32_t* places, const T* factors,
                 const T* rows, int64_t width, T* sum) {
    int64_t at = begin;
    for (; at + 12 * kWidth<T> <= end; at += 12 * kWidth<T>)
        gather<T, 12>(first, last, places, factors, rows + at, width, sum + at);
    for (; at < end; at += 4 * kWidth<T>) gather<T, 4>(first, last, places, factors, rows + at, width, sum + at);
}

// What one thread works with; kept from step to step, since what is allocated anew is paid for page by page.
template <typename T>
struct Scratch {
    std::vector<std::vector<T>> outputs, back;  // [units, 64] of the input and of every layer; gradients by them
    std::vector<T> across, row, picked;         // [64, padded units] of the first layer; a row; its kept weights'
    std::vector<T> slopes;                      // of all kept weights and biases of a lane
    std::vector<int64_t> begins;                // the block by input: where the examples of an input begin
    std::vector<int32_t> owners;                // which they are
    std::vector<T> factors;                     // and what they hold

    static Scratch& mine() {
        static thread_local Scratch scratch;
        return scratch;
    }
};

template <typename T>
struct Lane {
    std::vector<Layer> layers;
    const T* values;
    T* dense;  // [inputs, padded units], a copy of the first layer; or null
    Scratch<T>& own = Scratch<T>::mine();

    Lane(int64_t depth, const int64_t* sizes, const int64_t* starts, const int32_t* places, const int64_t* biases,
         const T* values, T* dense)
        : values(values), dense(dense) {
        own.outputs.resize(depth + 1);
        own.back.resize(depth + 1);
        for (int64_t i = 0; i <= depth; ++i) {
            own.outputs[i].resize(sizes[i] * kExamples);
            own.back[i].resize(sizes[i] * kExamples);
        }
        for (int64_t i = 0; i < depth; ++i) {
            layers.push_back({sizes[i], sizes[i + 1], starts, places, biases[i]});
            starts += (i == 0 ? sizes[0] : sizes[i + 1]) + 1;
        }
        if (!dense) return;
        own.across.resize(kExamples * width());
        own.row.resize(width());
        own.picked.resize(width());
    }

    // The dense copy is what the values say.
    void copy_out(int64_t input) {
        const Layer& layer = layers[0];
        T* row = dense + input * width();
        for (int64_t k = layer.starts[input]; k < layer.starts[input + 1]; ++k) row[layer.places[k]] = values[k];
    }

    int64_t width() const { return padded<T>(layers[0].units); }

    void first_layer(const Examples<T>& from, int64_t first, int64_t count) {
        const Layer& layer = layers[0];
        const bool rectify = layers.size() > 1;
        T* y = own.outputs[1].data();
        if (!dense) {
            by_input(from, first, count);
            for (int64_t u = 0; u < layer.units; ++u) std::fill_n(y + u * kExamples, kExamples, values[layer.bias + u]);
            for (int64_t i = 0; i < layer.inputs; ++i) {
                if (own.begins[i] == own.begins[i + 1] || layer.starts[i] == layer.starts[i + 1]) continue;
                T* x = own.outputs[0].data() + i * kExamples;
                std::fill_n(x, kExamples, T(0));
                for (int64_t at = own.begins[i]; at < own.begins[i + 1]; ++at) x[own.owners[at]] = own.factors[at];
                forward_of_input(layer, i, values, x, y);
            }
            if (rectify)
                for (int64_t k = 0; k < layer.units * kExamples; ++k) y[k] = y[k] > 0 ? y[k] : T(0);
            return;
        }
        T* sums = own.across.data();
        for (int64_t n = 0; n < kExamples; ++n) {
            std::copy_n(values + layer.bias, layer.units, sums + n * width());
            std::fill(sums + n * width() + layer.units, sums + (n + 1) * width(), T(0));
        }
        // A part of the units at a time, for which all inputs' weights stay in the cache.
        const int64_t part = 12 * kWidth<T>;
        for (int64_t begin = 0; begin < width(); begin += part)
            for (int64_t n = 0; n < count; ++n) {
                const int64_t row = from.at(first + n);
                gather_some<T>(begin, std::min(begin + part, width()), from.starts[row], from.starts[row + 1],
                               from.places, from.values, dense, width(), sums + n * width());
            }
        for (int64_t n = 0; n < kExamples; n += 8)
            for (int64_t u = 0; u < layer.units; ++u)
                for (int64_t m = n; m < n + 8; ++m) {
                    const T sum = sums[m * width() + u];
                    y[u * kExamples + m] = rectify && sum < 0 ? T(0) : sum;
                }
    }

    void run(const Examples<T>& from, int64_t first, int64_t count) {
        first_layer(from, first, count);
        for (size_t i = 1; i < layers.size(); ++i)
            forward(layers[i], values, own.outputs[i].data(), own.outputs[i + 1].data(), i + 1 < layers.size());
    }

    // Adds the block's losses and hits; where it is scaled, leaves the gradient of scale * loss by the last output.
    void score(const Examples<T>& from, int64_t first, int64_t count, double& loss, double& hits, T scale) {
        const int64_t units = layers.back().units;
        const T* out = own.outputs.back().data();
        T* slope = own.back.back().data();
        std::fill(slope, slope + units * kExamples, T(0));
        for (int64_t n = 0; n < count; ++n) {
            const int64_t truth = from.classes[from.at(first + n)];
            int64_t best = 0;
            for (int64_t u = 1; u < units; ++u)
                if (out[u * kExamples + n] > out[best * kExamples + n]) best = u;
            const T top = out[best * kExamples + n];
            T sum = 0;
            for (int64_t u = 0; u < units; ++u)
                sum += slope[u * kExamples + n] = std::exp(out[u * kExamples + n] - top);
            loss += double(std::log(sum) + top - out[truth * kExamples + n]);
            hits += best == truth;
            const T share = scale / sum;
            for (int64_t u = 0; u < units; ++u) slope[u * kExamples + n] *= share;
            slope[truth * kExamples + n] -= scale;
        }
    }

    void slopes_by_bias(const Layer& layer, const T* dy, T* slopes) const {
        for (int64_t unit = 0; unit < layer.units; ++unit)
            for (int64_t n = 0; n < kExamples; ++n) slopes[layer.bias + unit] += dy[unit * kExamples + n];
    }

    void first_backward(const Examples<T>& from, int64_t first, int64_t count, T* slopes, const Rule<T>* at_once) {
        const Layer& layer = layers[0];
        const T* dy = own.back[1].data();
        if (!dense) {
            for (int64_t i = 0; i < layer.inputs; ++i)
                if (own.begins[i] != own.begins[i + 1])
                    backward_of_input(layer, i, own.outputs[0].data() + i * kExamples, dy, slopes);
            return;
        }
        T* across = own.across.data();
        for (int64_t n = 0; n < kExamples; n += 8)
            for (int64_t u = 0; u < layer.units; ++u)
                for (int64_t m = n; m < n + 8; ++m) across[m * width() + u] = dy[u * kExamples + m];
        by_input(from, first, count);
        const T* row = own.row.data();
        const int32_t* places = layer.places;
        for (int64_t i = 0; i < layer.inputs; ++i) {
            const int64_t begin = layer.starts[i], end = layer.starts[i + 1];
            if (begin == end) continue;
            const bool silent = own.begins[i] == own.begins[i + 1];
            if (!silent) {
                std::fill(own.row.begin(), own.row.end(), T(0));
                gather_some<T>(0, width(), own.begins[i], own.begins[i + 1], own.owners.data(), own.factors.data(),
                               across, width(), own.row.data());
            }
            if (at_once) {
                // Picked first: reading by place within the update would keep it from being made of vectors.
                T* picked = own.picked.data();
                if (silent)
                    std::fill_n(picked, end - begin, T(0));
                else
                    for (int64_t k = begin; k < end; ++k) picked[k - begin] = row[places[k]];
                at_once->update(begin, end, picked - begin);
                copy_out(i);
            } else if (!silent) {
                for (int64_t k = begin; k < end; ++k) slopes[k] += row[places[k]];
            }
        }
    }

    // The block's inputs that are not zero, input by input: a counting sort.
    void by_input(const Examples<T>& from, int64_t first, int64_t count) {
        own.begins.assign(layers[0].inputs + 1, 0);
        int64_t all = 0;
        for (int64_t n = 0; n < count; ++n) {
            const int64_t row = from.at(first + n);
            all += from.starts[row + 1] - from.starts[row];
            for (int64_t k = from.starts[row]; k < from.starts[row + 1]; ++k) ++own.begins[from.places[k]];
        }
        own.owners.resize(all);
        own.factors.resize(all);
        for (int64_t i = 0; i < layers[0].inputs; ++i) own.begins[i + 1] += own.begins[i];  // now the ends
        for (int64_t n = count - 1; n >= 0; --n) {
            const int64_t row = from.at(first + n);
            for (int64_t k = from.starts[row]; k < from.starts[row + 1]; ++k) {
                const int64_t at = --own.begins[from.places[k]];
                own.owners[at] = int32_t(n);
                own.factors[at] = from.values[k];
            }
        }
    }

    void slope(const Examples<T>& from, int64_t first, int64_t count, T* slopes, const Rule<T>* at_once) {
        for (size_t i = layers.size() - 1; i > 0; --i) {
            const T* x = own.outputs[i].data();
            std::vector<T>& dx = own.back[i];
            std::fill(dx.begin(), dx.end(), T(0));
            slopes_by_bias(layers[i], own.back[i + 1].data(), slopes);
            backward(layers[i], values, x, own.back[i + 1].data(), slopes, dx.data());
            for (size_t k = 0; k < dx.size(); ++k) dx[k] = x[k] > 0 ? dx[k] : T(0);
        }
        slopes_by_bias(layers[0], own.back[1].data(), slopes);
        first_backward(from, first, count, slopes, at_once);
    }
};

}  // namespace

// Every network's mean loss and accuracy over `count` examples; with a rule also a step by the gradient of that mean.
//
// lanes networks of depth layers; sizes [depth + 1]: inputs, units of each layer. By network: offsets, where its rows
// begin in starts; ends, where its values end; copies, where its dense copy begins (-1: none). biases [lanes, depth].
// picks [lanes, count]: the numbers of each network's examples, or null: examples 0 to count.
template <typename T>
static void run(int64_t lanes, int64_t depth, const int64_t* sizes, const int64_t* offsets, const int64_t* starts,
                const int32_t* places, const int64_t* biases, const int64_t* ends, const int64_t* copies, T* dense,
                const T* values, const Rule<T>* rule, const int64_t* rows, const int32_t* columns, const T* inputs,
                const int64_t* classes, const int64_t* picks, int64_t count, double* losses, double* accuracies,
                int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t number = 0; number < lanes; ++number) {
        Lane<T> lane(depth, sizes, starts + offsets[number], places, biases + number * depth, values,
                     copies[number] < 0 ? nullptr : dense + copies[number]);
        const Examples<T> from{rows, columns, inputs, classes, picks ? picks + number * count : nullptr};
        const int64_t begin = number ? ends[number - 1] : 0, end = ends[number];
        // One block's gradient of the first layer need not be kept until another's is added.
        const bool at_once = rule && lane.dense && count <= kExamples;
        const int64_t first_bias = lane.layers[0].bias;
        T* slopes = nullptr;
        if (rule) {
            std::vector<T>& kept = lane.own.slopes;
            const int64_t from_here = at_once ? first_bias : begin;
            kept.resize(std::max<size_t>(kept.size(), end - from_here));
            std::fill_n(kept.begin(), end - from_here, T(0));
            slopes = kept.data() - from_here;
        }
        double loss = 0, hits = 0;
        for (int64_t first = 0; first < count; first += kExamples) {
            const int64_t some = std::min(kExamples, count - first);
            if (picks) from.fetch(first, some);
            lane.run(from, first, some);
            lane.score(from, first, some, loss, hits, T(1) / T(count));
            if (rule) lane.slope(from, first, some, slopes, at_once ? rule : nullptr);
        }
        if (rule) {
            rule->update(at_once ? first_bias : begin, end, slopes);
            if (lane.dense && !at_once)
                for (int64_t i = 0; i < sizes[0]; ++i) lane.copy_out(i);
        }
        losses[number] = loss / double(count);
        accuracies[number] = hits / double(count);
    }
}

// numbers: lr, beta1, beta2, eps, decay, unbias1, unbias2, adam, decoupled.
#define EXPORTED(T, NAME)                                                                                             \
    extern "C" void NAME(int64_t lanes, int64_t depth, const int64_t* sizes, const int64_t* offsets,                  \
                         const int64_t* starts, const int32_t* places, const int64_t* biases, const int64_t* ends,    \
                         const int64_t* copies, T* dense, T* values, T* mean, T* square, const double* numbers,       \
                         const int64_t* rows, const int32_t* columns, const T* inputs, const int64_t* classes,        \
                         const int64_t* picks, int64_t count, double* losses, double* accuracies, int64_t threads) {  \
        Rule<T> rule{};                                                                                               \
        if (numbers)                                                                                                  \
            rule = {T(numbers[0]), T(numbers[1]), T(numbers[2]), T(numbers[3]), T(numbers[4]), T(numbers[5]),         \
                    T(numbers[6]), numbers[7] != 0, numbers[8] != 0, values, mean, square};                           \
        run<T>(lanes, depth, sizes, offsets, starts, places, biases, ends, copies, dense, values,                     \
               numbers ? &rule : nullptr, rows, columns, inputs, classes, picks, count, losses, accuracies, threads); \
    }

EXPORTED(float, run_float32)
EXPORTED(double, run_float64)
