// The step of UPGD, weight-wise and to first order, on all parameters of a network: methods/upgd.py in two passes over
// memory. The first looks for the largest utility, the second updates. Normal numbers and gates are made in blocks that
// stay in the fastest cache; written whole, the normal numbers alone would be two more passes.
//
// Loops over a block are plain, for the compiler to make vectors of. In front of this file stand constants, from
// noise.py and compiler.py: kBlock, kMultiply1 to 3, kRootHalf, kLog, kCos, kExp, kLn2High, kLn2Low.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include <omp.h>

namespace {

constexpr int64_t kShare = 32;  // blocks from which another thread is worth waking
constexpr int64_t kPair = 2 * kBlock;  // weights whose normal numbers are made together: one block, and the next

struct Parameter {
    void* weights;  // [rows, columns], like the next two
    const void* gradients;
    void* utilities;
    void* row_ages;
    void* column_ages;
    int64_t rows, columns;
    int32_t labels[2];
    int64_t group;

    int64_t count() const { return rows * columns; }
    int64_t blocks() const { return (count() + kPair - 1) / kPair; }
};

struct Group {
    double lr, decay, noise, weight_decay;
    int32_t key[2];
    int32_t step, maximize, protect, doubled;
};

template <typename To, typename From>
inline To bits(From from) {
    To to;
    static_assert(sizeof to == sizeof from);
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// --- normal numbers: noise.py ---------------------------------------------------------------------------------------

inline uint32_t finished(uint32_t x, uint32_t multiplier) {
    x *= multiplier;
    return x ^ (x >> 16);
}

inline uint32_t mixed(uint32_t x) {
    x = (x ^ (x >> 16)) * kMultiply1;
    return finished(x ^ (x >> 15), kMultiply2);
}

template <size_t N>
inline float series(float x, const float (&coefficients)[N]) {
    float total = coefficients[N - 1];
    for (size_t k = N - 1; k-- > 0;) total = total * x + coefficients[k];
    return total;
}

struct Stamps {
    uint32_t first, second;

    Stamps(const Group& group, const Parameter& p) {
        const auto step = static_cast<uint32_t>(group.step);
        const auto one = static_cast<uint32_t>(p.labels[0]), two = static_cast<uint32_t>(p.labels[1]);
        first = mixed(static_cast<uint32_t>(group.key[0]) ^ mixed(step ^ one));
        second = mixed((static_cast<uint32_t>(group.key[1]) ^ mixed(step + two)) + first);
    }
};

// Not inlined: GCC would join its loop with what is around, and not make vectors of it.
__attribute__((noinline)) void normal(float* out, int64_t block, const Stamps& stamps) {
    const auto start = static_cast<uint32_t>(block * kBlock);
#pragma omp simd
    for (int32_t k = 0; k < kBlock; ++k) {
        const uint32_t word = mixed((start + static_cast<uint32_t>(k)) ^ stamps.first) + stamps.second;
        const auto high = static_cast<int32_t>(finished(word, kMultiply2)) >> 9;
        const float uniform = static_cast<float>(high) * 0x1p-23f + (0.5f + 0x1p-24f);
        const int32_t exponent = bits<int32_t>(uniform) - kRootHalf;
        const float f = bits<float>((exponent & 0x7FFFFF) + kRootHalf) - 1.0f;
        const float radius =
            std::sqrt(f * series(f, kLog) + static_cast<float>(exponent >> 23) * static_cast<float>(-2 * M_LN2));
        const auto angle = static_cast<int32_t>(finished(word, kMultiply3));
        const float one = static_cast<float>(angle) * 0x1p-32f;
        const float two = static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(angle) - (1u << 30))) * 0x1p-32f;
        out[k] = radius * series(one * one, kCos);
        out[kBlock + k] = radius * series(two * two, kCos);
    }
}

// --- the gate -------------------------------------------------------------------------------------------------------

// Between -87 and 88. By whole numbers, of which the processor has minima: as such, floats of one sign are in order, and
// those of the other are below all (signed) or above (not signed). What is no number becomes one.
inline float clamped(float x) {
    const auto below = static_cast<uint32_t>(std::min(bits<int32_t>(x), bits<int32_t>(88.0f)));
    return bits<float>(std::min(below, bits<uint32_t>(-87.0f)));
}

// 1 / (1 + exp(x))
inline float sigmoid_of_minus(float x) {
    x = clamped(x);
    const float whole = std::nearbyint(x * static_cast<float>(M_LOG2E));
    const float t = (whole * kLn2High - x) + whole * kLn2Low;
    const float power = bits<float>((static_cast<int32_t>(whole) + 127) << 23);
    return 1.0f / (1.0f + (series(t, kExp) * (t * t) - t + 1.0f) * power);
}

inline double sigmoid_of_minus(double x) { return 1.0 / (1.0 + std::exp(x)); }

// Not a number if one of them is none.
template <typename T>
inline T larger(T a, T b) {
    return a > b || a != a ? a : b;
}

// What a parameter's utilities are multiplied by, by row and column, of which the larger holds; one number where all
// weights are of the same age.
template <typename T>
class Scales {
   public:
    // Weights get a step older.
    Scales(const Parameter& p, double decay) : width_(p.columns) {
        const T log = std::log(static_cast<T>(decay));
        const auto aged = [&](void* ages, int64_t n, std::vector<T>& reached) {
            auto* age = static_cast<T*>(ages);
            bool same = n > 0;
            for (int64_t k = 0; k < n; ++k) {
                age[k] += 1;
                same &= age[k] == age[0];
            }
            reached.resize(same ? 1 : n);
            for (size_t k = 0; k < reached.size(); ++k) reached[k] = -std::expm1(age[k] * log);
        };
        aged(p.row_ages, p.rows, rows_reached_);
        aged(p.column_ages, p.columns, columns_reached_);
        scale(T(1));
    }

    // 1 / (what the average has reached * largest), finite
    void scale(T largest) {
        const auto make = [&](const std::vector<T>& reached, std::vector<T>& scales) {
            scales.resize(reached.size());
            for (size_t k = 0; k < reached.size(); ++k) {
                const T scale = 1 / (reached[k] * largest);
                scales[k] = scale > std::numeric_limits<T>::max() ? std::numeric_limits<T>::max() : scale;
            }
        };
        make(rows_reached_, rows_);
        make(columns_reached_, columns_);
    }

    // Those of n weights from one on.
    void read(T* out, int64_t first, int64_t n) const {
        if (rows_.size() == 1 && columns_.size() == 1) {
            std::fill(out, out + n, larger(rows_[0], columns_[0]));
            return;
        }
        int64_t row = first / width_, column = first % width_;
        for (int64_t k = 0; k < n; ++k) {
            out[k] = larger(rows_[rows_.size() == 1 ? 0 : row], columns_[columns_.size() == 1 ? 0 : column]);
            if (++column == width_) column = 0, ++row;
        }
    }

   private:
    int64_t width_;
    std::vector<T> rows_reached_, columns_reached_, rows_, columns_;
};

// --- one block of weights -------------------------------------------------------------------------------------------

// A parameter's numbers in the type that is calculated in.
template <typename T>
struct Block {
    T *w, *u;
    const T* g;
    T rate, decay, noise, kept, sign;

    // Where the largest utility is not finite, no weight is a number after the step.
    Block(const Parameter& p, const Group& group, T maximum = 0)
        : w(static_cast<T*>(p.weights)),
          u(static_cast<T*>(p.utilities)),
          g(static_cast<const T*>(p.gradients)),
          rate(static_cast<T>(group.lr) * (group.doubled ? 2 : 1) + 0 * maximum),
          decay(static_cast<T>(group.decay)),
          noise(static_cast<T>(group.noise)),
          kept(1 - static_cast<T>(group.lr) * static_cast<T>(group.weight_decay)),
          sign(group.maximize ? -1 : 1) {}

    T utility(int64_t k) const { return decay * u[k] - (1 - decay) * (sign * g[k] * w[k]); }

    // The largest utility, corrected, of n weights from one on; not a number if one of them is none.
    T largest(int64_t first, int64_t n, const T* scales) const {
        T most = -std::numeric_limits<T>::infinity();
        int32_t lost = 0;
#pragma omp simd reduction(max : most) reduction(| : lost)
        for (int64_t k = 0; k < n; ++k) {
            const T corrected = utility(first + k) * scales[k];
            most = corrected > most ? corrected : most;
            lost |= corrected != corrected;
        }
        return lost ? std::numeric_limits<T>::quiet_NaN() : most;
    }

    // The step of n weights from one on. Protect: the gate is on the gradient too.
    template <bool Protect>
    void step(int64_t first, int64_t n, const T* scales, const float* normals) {
        const Block of = *this;  // in registers: what is written might else be one of these numbers
#pragma omp simd
        for (int64_t k = first; k < first + n; ++k) {
            const T grad = of.sign * of.g[k], next = of.utility(k);
            const T free = sigmoid_of_minus(next * scales[k - first]);
            const T drawn = of.noise * static_cast<T>(normals[k - first]);
            const T update = Protect ? (grad + drawn) * free : grad + drawn * free;
            of.u[k] = next;
            of.w[k] = of.kept * of.w[k] - of.rate * update;
        }
    }
};

// A thread's share of all blocks: ``body(parameter, first block, one past the last)``.
template <typename Body>
void share(int64_t count, const Parameter* parameters, int64_t thread, int64_t threads, const Body& body) {
    int64_t all = 0, passed = 0;
    for (int64_t k = 0; k < count; ++k) all += parameters[k].blocks();
    const int64_t begin = all * thread / threads, end = all * (thread + 1) / threads;
    for (int64_t k = 0; k < count; ++k) {
        const int64_t blocks = parameters[k].blocks();
        const int64_t from = std::max(begin - passed, int64_t{0}), to = std::min(end - passed, blocks);
        if (from < to) body(k, from, to);
        passed += blocks;
    }
}

template <typename T>
void run(int64_t count, const Parameter* parameters, const Group* groups, int64_t threads) {
    std::vector<Scales<T>> scales;
    int64_t all = 0;
    for (int64_t k = 0; k < count; ++k) {
        scales.emplace_back(parameters[k], groups[parameters[k].group].decay);
        all += parameters[k].blocks();
    }
    threads = std::max(int64_t{1}, std::min(threads, all / kShare));
    T maximum = -std::numeric_limits<T>::infinity();
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        const int64_t mine = omp_get_thread_num(), there = omp_get_num_threads();
        T most = -std::numeric_limits<T>::infinity(), factors[kPair];
        float normals[kPair];
        share(count, parameters, mine, there, [&](int64_t k, int64_t from, int64_t to) {
            const Parameter& p = parameters[k];
            const Block<T> block(p, groups[p.group]);
            for (int64_t b = from; b < to; ++b) {
                const int64_t first = b * kPair, n = std::min(kPair, p.count() - first);
                scales[k].read(factors, first, n);
                most = larger(block.largest(first, n, factors), most);
            }
        });
#pragma omp critical
        maximum = larger(most, maximum);
#pragma omp barrier
#pragma omp single
        {
            const T tiny = std::numeric_limits<T>::min();
            for (auto& scale : scales) scale.scale(maximum < tiny ? tiny : maximum);
        }
        share(count, parameters, mine, there, [&](int64_t k, int64_t from, int64_t to) {
            const Parameter& p = parameters[k];
            const Stamps stamps(groups[p.group], p);
            Block<T> block(p, groups[p.group], maximum);
            for (int64_t b = from; b < to; ++b) {
                const int64_t first = b * kPair, n = std::min(kPair, p.count() - first);
                scales[k].read(factors, first, n);
                normal(normals, b, stamps);
                if (groups[p.group].protect)
                    block.template step<true>(first, n, factors, normals);
                else
                    block.template step<false>(first, n, factors, normals);
            }
        });
    }
}

}  // namespace

extern "C" void step_float(int64_t count, const Parameter* parameters, const Group* groups, int64_t threads) {
    run<float>(count, parameters, groups, threads);
}

extern "C" void step_double(int64_t count, const Parameter* parameters, const Group* groups, int64_t threads) {
    run<double>(count, parameters, groups, threads);
}
