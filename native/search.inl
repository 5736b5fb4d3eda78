// The search, compiled once for every instruction set: DISTOT_ISA names the namespace, LANES the floats of a register.
//
// A lane is a sample (or a draw). A panel is a few registers of samples, packed so that a coordinate of all of them is
// contiguous; it meets the atoms one small group at a time, with all scores of the group in registers. Scores never go
// to memory unless one beats the k-th best of its sample so far, which happens some k ln(n / k) times in n.

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "search.hpp"

namespace distot::DISTOT_ISA {

typedef float V __attribute__((vector_size(LANES * 4)));
typedef int32_t Mask __attribute__((vector_size(LANES * 4)));

inline V all(float value) { return V{} + value; }
inline V larger(V a, V b) { return a > b ? a : b; }
inline V smaller(V a, V b) { return a < b ? a : b; }

inline bool any(Mask mask) {
#if LANES == 16 && defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif LANES == 8 && defined(__AVX__)
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    int32_t found = 0;
    for (int i = 0; i < LANES; ++i) found |= mask[i];
    return found != 0;
#endif
}

constexpr int64_t TILE_BYTES = 128 << 10;  // of atoms, to stay in the second-level cache while panels pass by
constexpr int CHUNK = 8;                   // panels that a thread takes at a time
constexpr int64_t VISITORS = 4096;         // samples that a thread takes at a time to lists

// Memory for vectors, which need more alignment than malloc gives.
template <class T>
struct Aligned {
    typedef T value_type;
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const Aligned&) const { return true; }
};
template <class T>
using Buffer = std::vector<T, Aligned<T>>;

// Puts a row of numbers into a panel of ``rows`` rows, where a coordinate of all of them is contiguous.
inline void place(V* panel, int64_t rows, int64_t row, const float* from, int64_t width) {
    float* to = reinterpret_cast<float*>(panel);
    for (int64_t q = 0; q < width; ++q) to[q * rows + row] = from[q];
}

// sum <- sum + products of the rows of a panel with N atoms, which are ``stride`` numbers apart.
template <int N, int REGISTERS>
[[gnu::always_inline]] inline void multiply(V (&sum)[N][REGISTERS], const V* x, const float* y, int64_t width,
                                            int64_t stride) {
    for (int64_t q = 0; q < width; ++q, x += REGISTERS)
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j)
#pragma GCC unroll 8
            for (int m = 0; m < REGISTERS; ++m) sum[j][m] += x[m] * y[j * stride + q];
}

// The scores of the rows of a panel with atoms a to a + N - 1, which lie in a row each.
template <int N, int REGISTERS>
[[gnu::always_inline]] inline void scores(V (&score)[N][REGISTERS], const V* x, const Request& r, int64_t a) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j)
#pragma GCC unroll 8
        for (int m = 0; m < REGISTERS; ++m) score[j][m] = all(r.heights[a + j]);
    multiply(score, x, r.atoms + a * r.width, r.width, r.width);
}

// The k best of each of some rows, best first.
struct Best {
    int k;
    std::vector<float> score;
    std::vector<int32_t> index;

    Best(int64_t rows, int k) : k(k), score(rows * k), index(rows * k) {}
    void load(const Request& r, int64_t first, int64_t rows) {
        std::fill(score.begin(), score.end(), -FLT_MAX);
        std::fill(index.begin(), index.end(), INT32_MAX);
        if (!r.more) return;
        std::copy_n(r.score + first * k, rows * k, score.data());
        std::copy_n(r.index + first * k, rows * k, index.data());
    }
    void store(const Request& r, int64_t first, int64_t rows) const {
        std::copy_n(score.data(), rows * k, r.score + first * k);
        std::copy_n(index.data(), rows * k, r.index + first * k);
    }
    float last(int64_t row) const { return score[row * k + k - 1]; }
    bool beats(int64_t at, float value, int32_t atom) const {
        return value > score[at] || (value == score[at] && atom < index[at]);
    }
    // Adds an atom if it beats the k-th best; returns the k-th best score.
    float insert(int64_t row, float value, int32_t atom) {
        int64_t j = row * k + k - 1;
        if (!beats(j, value, atom)) return score[j];
        for (; j > row * k && beats(j - 1, value, atom); --j) {
            score[j] = score[j - 1];
            index[j] = index[j - 1];
        }
        score[j] = value;
        index[j] = atom;
        return last(row);
    }
};

// Plain samples: REGISTERS vectors of them against GROUP atoms. LISTED: atoms do not come in the order of their indices,
// so one that only equals the k-th best may still have a lower index.
template <bool LISTED>
struct Plain {
    static constexpr int REGISTERS = LANES == 16 ? 4 : 3, GROUP = LANES == 16 ? 6 : 4;
    static constexpr int ROWS = REGISTERS * LANES;

    const Request& request;
    struct Panel {
        Buffer<V> x;  // (width, REGISTERS)
        V limit[REGISTERS];
        Best best;
        int64_t first;
        Panel(const Request& r) : x(r.width * REGISTERS), best(ROWS, r.k) {}
    };

    static Mask passes(V score, V limit) { return LISTED ? score >= limit : score > limit; }
    int32_t name(int64_t atom) const { return LISTED ? request.lists.index[atom] : request.first + atom; }

    void load(Panel& panel, int64_t first) const {
        const int64_t rows = std::min<int64_t>(ROWS, request.draws - first);
        panel.first = first;
        panel.best.load(request, first, rows);
        for (int64_t row = 0; row < ROWS; ++row) admit(panel, row, first + std::min(row, rows - 1));
    }

    // Puts a sample into a row of the panel, whose best are there already.
    void admit(Panel& panel, int64_t row, int64_t sample) const {
        place(panel.x.data(), ROWS, row, request.x + sample * request.width, request.width);
        panel.limit[row / LANES][row % LANES] = panel.best.last(row);
    }

    template <int N>
    void group(Panel& panel, int64_t a) const {
        V score[N][REGISTERS];
        scores(score, panel.x.data(), request, a);
        Mask hit{};
#pragma GCC unroll 8
        for (int m = 0; m < REGISTERS; ++m) {
            V top = score[0][m];
#pragma GCC unroll 8
            for (int j = 1; j < N; ++j) top = larger(top, score[j][m]);
            hit |= passes(top, panel.limit[m]);
        }
        if (__builtin_expect(any(hit), 0)) {
            V kept[N][REGISTERS];
            memcpy(kept, score, sizeof kept);
            take<N>(panel, a, kept);
        }
    }

    template <int N>
    __attribute__((noinline)) void take(Panel& panel, int64_t a, const V (*score)[REGISTERS]) const {
        for (int m = 0; m < REGISTERS; ++m)
            for (int j = 0; j < N; ++j) {
                const Mask pass = passes(score[j][m], panel.limit[m]);
                if (!any(pass)) continue;
                for (int lane = 0; lane < LANES; ++lane)
                    if (pass[lane])
                        panel.limit[m][lane] = panel.best.insert(m * LANES + lane, score[j][m][lane], name(a + j));
            }
    }

    void tile(Panel& panel, int64_t a, int64_t end) const {
        for (; a + GROUP <= end; a += GROUP) group<GROUP>(panel, a);
        for (; a < end; ++a) group<1>(panel, a);
    }

    void store(const Panel& panel) const {
        panel.best.store(request, panel.first, std::min<int64_t>(ROWS, request.draws - panel.first));
    }
};

// sum + the products of two pairs of bfloat16 in each lane.
inline V add_products(V sum, Mask x, uint32_t y) {
#if defined(__AVX512BF16__)
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)_mm512_set1_epi32(int(y)));
#else
    const int32_t high = int32_t(y & 0xFFFF0000u), low = int32_t(y << 16);
    float even, odd;
    memcpy(&even, &low, sizeof even);
    memcpy(&odd, &high, sizeof odd);
    return sum + (V)(x << 16) * even + (V)(x & ~0xFFFF) * odd;
#endif
}

// Plain samples, where candidates are found by products in bfloat16 and decided in float32, in the order of ``scores``:
// the same winners and scores as those of Plain<false>, bit for bit.
struct Candidates {
    static constexpr int REGISTERS = LANES == 16 ? 4 : 3, GROUP = LANES == 16 ? 6 : 3;
    static constexpr int ROWS = REGISTERS * LANES;
    static constexpr int WAITING = 8;  // vectors of candidates that are decided together, as each is a chain of sums

    const Request& request;
    struct Panel {
        Buffer<V> x;         // (width, REGISTERS)
        Buffer<Mask> pairs;  // (pairs, REGISTERS)
        V limit[REGISTERS];
        Best best;
        int64_t first, atom[WAITING];
        int part[WAITING], waiting = 0;
        Panel(const Request& r) : x(r.width * REGISTERS), pairs(r.narrow.pairs * REGISTERS), best(ROWS, r.k) {}
    };

    void load(Panel& panel, int64_t first) const {
        const int64_t rows = std::min<int64_t>(ROWS, request.draws - first), count = request.narrow.pairs;
        panel.first = first;
        panel.best.load(request, first, rows);
        uint32_t* pairs = reinterpret_cast<uint32_t*>(panel.pairs.data());
        for (int64_t row = 0; row < ROWS; ++row) {
            const int64_t sample = first + std::min(row, rows - 1);
            place(panel.x.data(), ROWS, row, request.x + sample * request.width, request.width);
            for (int64_t q = 0; q < count; ++q) pairs[q * ROWS + row] = request.narrow.x[sample * count + q];
            panel.limit[row / LANES][row % LANES] = panel.best.last(row);
        }
    }

    template <int N>
    void group(Panel& panel, int64_t a) const {
        V most[N][REGISTERS];
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j)
#pragma GCC unroll 8
            for (int m = 0; m < REGISTERS; ++m) most[j][m] = all(request.narrow.bound[a + j]);
        const int64_t count = request.narrow.pairs;
        const Mask* x = panel.pairs.data();
        const uint32_t* y = request.narrow.atoms + a * count;
        for (int64_t q = 0; q < count; ++q, x += REGISTERS)
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j)
#pragma GCC unroll 8
                for (int m = 0; m < REGISTERS; ++m) most[j][m] = add_products(most[j][m], x[m], y[j * count + q]);
        Mask hit{};
#pragma GCC unroll 8
        for (int m = 0; m < REGISTERS; ++m) {
            V top = most[0][m];
#pragma GCC unroll 8
            for (int j = 1; j < N; ++j) top = larger(top, most[j][m]);
            hit |= top > panel.limit[m];
        }
        if (__builtin_expect(any(hit), 0)) {
            V kept[N][REGISTERS];
            memcpy(kept, most, sizeof kept);
            wait<N>(panel, a, kept);
        }
    }

    template <int N>
    __attribute__((noinline)) void wait(Panel& panel, int64_t a, const V (*most)[REGISTERS]) const {
        for (int m = 0; m < REGISTERS; ++m)
            for (int j = 0; j < N; ++j)
                if (any(most[j][m] > panel.limit[m])) {
                    panel.atom[panel.waiting] = a + j;
                    panel.part[panel.waiting++] = m;
                    if (panel.waiting == WAITING) decide(panel);
                }
    }

    // The scores of candidates in float32. Where fewer wait than fit, the last of those before them are computed again.
    __attribute__((noinline)) void decide(Panel& panel) const {
        const V* x[WAITING];
        const float* y[WAITING];
        V score[WAITING];
        for (int i = 0; i < WAITING; ++i) {
            const int from = i < panel.waiting ? i : 0;
            x[i] = panel.x.data() + panel.part[from];
            y[i] = request.atoms + panel.atom[from] * request.width;
            score[i] = all(request.heights[panel.atom[from]]);
        }
        for (int64_t q = 0; q < request.width; ++q)
#pragma GCC unroll 8
            for (int i = 0; i < WAITING; ++i) score[i] += x[i][q * REGISTERS] * y[i][q];
        for (int i = 0; i < panel.waiting; ++i) {
            const int m = panel.part[i];
            const Mask pass = score[i] >= panel.limit[m];  // of equal ones the lower index may have waited
            if (!any(pass)) continue;
            for (int lane = 0; lane < LANES; ++lane)
                if (pass[lane])
                    panel.limit[m][lane] =
                        panel.best.insert(m * LANES + lane, score[i][lane], int32_t(request.first + panel.atom[i]));
        }
        panel.waiting = 0;
    }

    void tile(Panel& panel, int64_t a, int64_t end) const {
        for (; a + GROUP <= end; a += GROUP) group<GROUP>(panel, a);
        for (; a < end; ++a) group<1>(panel, a);
        if (panel.waiting) decide(panel);
    }

    void store(const Panel& panel) const {
        panel.best.store(request, panel.first, std::min<int64_t>(ROWS, request.draws - panel.first));
    }
};

// p_k <- sum_b H_kb p_b in place, H the Sylvester matrix of scipy.linalg.hadamard.
template <int G>
inline void transform(V* p) {
#pragma GCC unroll 4
    for (int half = 1; half < G; half *= 2)
#pragma GCC unroll 8
        for (int base = 0; base < G; base += 2 * half)
#pragma GCC unroll 8
            for (int i = base; i < base + half; ++i) {
                const V sum = p[i] + p[i + half], difference = p[i] - p[i + half];
                p[i] = sum;
                p[i + half] = difference;
            }
}

// Orbits: partial products with G blocks, then a fast Hadamard transform gives s = <H z, y> and with it the scores h + s
// and h - s of 2 G points.
template <int G>
struct Orbits {
    static constexpr int REGISTERS = LANES == 16 ? 2 : 4, GROUP = LANES == 16 ? 6 : 3;
    static constexpr int ROWS = REGISTERS * LANES, POINTS = 2 * G;

    const Request& request;
    struct Panel {
        Buffer<V> x;             // (G, width, REGISTERS)
        V above[REGISTERS][G];   // k-th best scores of the points + H z
        V below[REGISTERS][G];   // and of the points - H z
        Best best;               // rows as in the output
        int64_t first;
        Panel(const Request& r) : x(G * r.width * REGISTERS), best(ROWS * POINTS, r.k) {}
    };

    void load(Panel& panel, int64_t first) const {
        panel.first = first;
        panel.best.load(request, first * POINTS, std::min<int64_t>(ROWS, request.draws - first) * POINTS);
        for (int64_t row = 0; row < ROWS; ++row)
            for (int i = 0; i < G; ++i) raise(panel, row, i);
        const int64_t length = G * request.width;
        for (int64_t row = 0; row < ROWS; ++row)
            place(panel.x.data(), ROWS, row, request.x + std::min(first + row, request.draws - 1) * length, length);
    }

    static void raise(Panel& panel, int64_t row, int i) {
        panel.above[row / LANES][i][row % LANES] = panel.best.last(row * POINTS + i);
        panel.below[row / LANES][i][row % LANES] = panel.best.last(row * POINTS + G + i);
    }

    // The largest s - above and - s - below; half of the transform at a time, which registers can hold.
    static inline V excess(const V* p, const V* above, const V* below) {
        V most = all(-FLT_MAX), least = all(FLT_MAX);
#pragma GCC unroll 2
        for (int side = 0; side < 2; ++side) {
            V s[G / 2];
#pragma GCC unroll 8
            for (int i = 0; i < G / 2; ++i) s[i] = side ? p[i] - p[i + G / 2] : p[i] + p[i + G / 2];
            transform<G / 2>(s);
#pragma GCC unroll 8
            for (int i = 0; i < G / 2; ++i) {
                most = larger(most, s[i] - above[side * G / 2 + i]);
                least = smaller(least, s[i] + below[side * G / 2 + i]);
            }
        }
        return larger(most, -least);
    }

    template <int N>
    void group(Panel& panel, int64_t a) const {
        const int64_t width = request.width, length = G * width;
        const float* y = request.atoms + a * length;
        V p[N][REGISTERS][G];
        const V* x = panel.x.data();
        for (int b = 0; b < G; ++b, y += width, x += width * REGISTERS) {
            V sum[N][REGISTERS] = {};
            multiply(sum, x, y, width, length);
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j)
#pragma GCC unroll 8
                for (int m = 0; m < REGISTERS; ++m) p[j][m][b] = sum[j][m];
        }
        for (int j = 0; j < N; ++j)
            for (int m = 0; m < REGISTERS; ++m)
                if (__builtin_expect(any(excess(p[j][m], panel.above[m], panel.below[m]) > -request.heights[a + j]), 0))
                    take(panel, m, a + j, p[j][m]);
    }

    __attribute__((noinline)) void take(Panel& panel, int m, int64_t a, V* s) const {
        const float h = request.heights[a];
        transform<G>(s);
        for (int i = 0; i < G; ++i) {
            const Mask pass = (h + s[i] > panel.above[m][i]) | (h - s[i] > panel.below[m][i]);
            if (!any(pass)) continue;
            for (int lane = 0; lane < LANES; ++lane)
                if (pass[lane]) {
                    const int64_t row = m * LANES + lane;
                    panel.best.insert(row * POINTS + i, h + s[i][lane], request.first + a);
                    panel.best.insert(row * POINTS + G + i, h - s[i][lane], request.first + a);
                    raise(panel, row, i);
                }
        }
    }

    void tile(Panel& panel, int64_t a, int64_t end) const {
        for (; a + GROUP <= end; a += GROUP) group<GROUP>(panel, a);
        for (; a < end; ++a) group<1>(panel, a);
    }

    void store(const Panel& panel) const {
        panel.best.store(request, panel.first * POINTS, std::min<int64_t>(ROWS, request.draws - panel.first) * POINTS);
    }
};

// Threads take pieces of the work until none is left; ``work(take)`` runs on each, and take() gives the next piece.
template <class Work>
void share(int64_t pieces, int threads, const Work& work) {
    std::atomic<int64_t> next{0};
    auto take = [&] { return std::min(next.fetch_add(1), pieces); };
    std::vector<std::thread> helpers;
    for (int64_t t = 1; t < std::min<int64_t>(threads, pieces); ++t) helpers.emplace_back([&] { work(take); });
    work(take);
    for (std::thread& helper : helpers) helper.join();
}

// Every sample against every atom: a tile of atoms meets all panels of a piece while it is in cache.
template <class Kernel>
void sweep(const Kernel& kernel) {
    const Request& r = kernel.request;
    const int64_t panels = (r.draws + Kernel::ROWS - 1) / Kernel::ROWS;
    const int64_t chunk = std::max<int64_t>(1, std::min<int64_t>(CHUNK, panels / r.threads));
    const int64_t tile = std::max<int64_t>(64, TILE_BYTES / (4 * r.g * r.width)), pieces = (panels + chunk - 1) / chunk;
    share(pieces, r.threads, [&](auto& take) {
        std::vector<typename Kernel::Panel> mine;
        for (int64_t i = 0; i < chunk; ++i) mine.emplace_back(r);
        for (int64_t piece; (piece = take()) < pieces;) {
            const int64_t first = piece * chunk, count = std::min(chunk, panels - first);
            for (int64_t i = 0; i < count; ++i) kernel.load(mine[i], (first + i) * Kernel::ROWS);
            for (int64_t a = 0; a < r.n; a += tile)
                for (int64_t i = 0; i < count; ++i) kernel.tile(mine[i], a, std::min(a + tile, r.n));
            for (int64_t i = 0; i < count; ++i) kernel.store(mine[i]);
        }
    });
}

// Samples of a piece, packed so that a coordinate of all of them is contiguous, and their routes to a few lists at a time.
struct Guide {
    static constexpr int64_t AHEAD = 4;  // lists

    const Lists& lists;
    int64_t rows;  // a multiple of LANES
    Buffer<V> guide, route;  // (width, rows), (AHEAD, rows)

    Guide(const Lists& lists, int64_t rows)
        : lists(lists), rows(rows), guide(lists.width * rows / LANES), route(AHEAD * rows / LANES) {}

    void load(int64_t first, int64_t count) {
        for (int64_t row = 0; row < rows; ++row)
            place(guide.data(), rows, row, lists.guide + (first + std::min(row, count - 1)) * lists.width, lists.width);
    }

    template <int N>
    void to(int64_t c) {
        const int64_t vectors = rows / LANES;
        for (int64_t v = 0; v < vectors; ++v) {
            V sum[N];
            for (int j = 0; j < N; ++j) sum[j] = all(lists.bias[c + j]);
            for (int64_t q = 0; q < lists.width; ++q)
                for (int j = 0; j < N; ++j) sum[j] += guide[q * vectors + v] * lists.way[(c + j) * lists.width + q];
            for (int j = 0; j < N; ++j) route[j * vectors + v] = sum[j];
        }
    }

    const V* to_list(int64_t c) {
        if (c % AHEAD == 0 && c + AHEAD <= lists.count) to<AHEAD>(c);
        if (c >= lists.count / AHEAD * AHEAD) return to<1>(c), route.data();
        return route.data() + c % AHEAD * rows / LANES;
    }
};

// Every sample against the lists that it visits: list by list, panels are filled with the samples of a piece that do.
void visit(const Plain<true>& kernel) {
    constexpr int64_t ROWS = Plain<true>::ROWS;
    const Request& r = kernel.request;
    const int64_t wanted = std::min<int64_t>(VISITORS, (r.draws + r.threads - 1) / r.threads);
    const int64_t piece_rows = (wanted + LANES - 1) / LANES * LANES, pieces = (r.draws + piece_rows - 1) / piece_rows;
    share(pieces, r.threads, [&](auto& take) {
        Plain<true>::Panel panel(r);
        Best best(piece_rows, r.k);
        Guide guide(r.lists, piece_rows);
        Buffer<V> low(piece_rows / LANES), high(piece_rows / LANES);
        float* limit = reinterpret_cast<float*>(low.data());
        std::vector<int64_t> visitors(piece_rows + 1);
        int64_t scored = 0;
        for (int64_t piece; (piece = take()) < pieces;) {
            const int64_t first = piece * piece_rows, rows = std::min(piece_rows, r.draws - first);
            best.load(r, first, rows);
            guide.load(first, rows);
            std::fill(low.begin(), low.end(), all(FLT_MAX));
            std::fill(high.begin(), high.end(), all(FLT_MAX));
            for (int64_t i = 0; i < rows; ++i) limit[i] = r.lists.limit ? r.lists.limit[first + i] : best.last(i);
            if (r.lists.ceiling) memcpy(high.data(), r.lists.ceiling + first, rows * sizeof(float));
            for (int64_t c = 0; c < r.lists.count; ++c) {
                const V* route = guide.to_list(c);
                const int64_t start = r.lists.starts[c], end = r.lists.starts[c + 1];
                int64_t count = 0;
                for (int64_t v = 0; v < piece_rows / LANES; ++v)
                    if (const Mask pass = (route[v] >= low[v]) & (route[v] < high[v]); any(pass))
                        for (int lane = 0; lane < LANES; ++lane)
                            visitors[count] = v * LANES + lane, count -= pass[lane];  // a lane that passes is -1
                scored += count * (end - start);
                for (int64_t from = 0; from < count; from += ROWS) {
                    const int64_t filled = std::min(ROWS, count - from);
                    for (int64_t row = 0; row < ROWS; ++row) {
                        const int64_t who = visitors[from + std::min(row, filled - 1)];
                        std::copy_n(&best.score[who * r.k], r.k, &panel.best.score[row * r.k]);
                        std::copy_n(&best.index[who * r.k], r.k, &panel.best.index[row * r.k]);
                        kernel.admit(panel, row, first + who);
                    }
                    kernel.tile(panel, start, end);
                    for (int64_t row = 0; row < filled; ++row) {
                        const int64_t who = visitors[from + row];
                        std::copy_n(&panel.best.score[row * r.k], r.k, &best.score[who * r.k]);
                        std::copy_n(&panel.best.index[row * r.k], r.k, &best.index[who * r.k]);
                        if (!r.lists.limit) limit[who] = best.last(who);
                    }
                }
            }
            best.store(r, first, rows);
        }
        *r.lists.scored += scored;
    });
}

// exp(a) for a <= 0, to a few units in the last place; 0 below -87.
inline V exponential(V a) {
    const V turns = a * 1.44269504f;
    const Mask n = __builtin_convertvector(turns - 0.5f, Mask);  // rounds to the nearest, as turns <= 0
    const V f = (a - __builtin_convertvector(n, V) * 0.693145752f) - __builtin_convertvector(n, V) * 1.42860677e-6f;
    V p = f * (1.f / 5040) + 1.f / 720;
    p = p * f + 1.f / 120;
    p = p * f + 1.f / 24;
    p = p * f + 1.f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.f;
    p = p * f + 1.f;
    const V power = (V)((n + 127) << 23);
    return a < -87.f ? V{} : p * power;
}

// The log-sum-exp of every sample over all atoms: a running maximum, and the sum of exponentials relative to it.
struct Softmax {
    static constexpr int REGISTERS = LANES == 16 ? 4 : 3, GROUP = LANES == 16 ? 6 : 4;
    static constexpr int ROWS = REGISTERS * LANES;
    static constexpr float NEGLIGIBLE = 40;  // exp(-40) of the largest term, times any number of atoms, is no more than rounding

    const Request& request;
    const Soft& soft;
    struct Panel {
        Buffer<V> x;  // (width, REGISTERS)
        V top[REGISTERS], sum[REGISTERS];
        int64_t first;
        Panel(const Request& r) : x(r.width * REGISTERS) {}
    };

    void load(Panel& panel, int64_t first) const {
        panel.first = first;
        const int64_t width = request.width;
        for (int64_t row = 0; row < ROWS; ++row)
            place(panel.x.data(), ROWS, row, request.x + std::min(first + row, request.draws - 1) * width, width);
        for (int m = 0; m < REGISTERS; ++m) panel.top[m] = all(-FLT_MAX / 4), panel.sum[m] = V{};
    }

    template <int N>
    void group(Panel& panel, int64_t a) const {
        V score[N][REGISTERS];
        scores(score, panel.x.data(), request, a);
        const float inverse = 1 / soft.epsilon, reach = NEGLIGIBLE * soft.epsilon;
#pragma GCC unroll 8
        for (int m = 0; m < REGISTERS; ++m) {
            V most = score[0][m];
#pragma GCC unroll 8
            for (int j = 1; j < N; ++j) most = larger(most, score[j][m]);
            if (!any(most > panel.top[m] - reach)) continue;
            const V top = larger(most, panel.top[m]);
            V sum = panel.sum[m] * exponential((panel.top[m] - top) * inverse);
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) sum += exponential((score[j][m] - top) * inverse);
            panel.top[m] = top;
            panel.sum[m] = sum;
        }
    }

    void tile(Panel& panel, int64_t a, int64_t end) const {
        for (; a + GROUP <= end; a += GROUP) group<GROUP>(panel, a);
        for (; a < end; ++a) group<1>(panel, a);
    }

    void store(const Panel& panel) const {
        const int64_t rows = std::min<int64_t>(ROWS, request.draws - panel.first);
        for (int64_t row = 0; row < rows; ++row) {
            const double sum = panel.sum[row / LANES][row % LANES], top = panel.top[row / LANES][row % LANES];
            soft.logsumexp[panel.first + row] = top + double(soft.epsilon) * std::log(sum);
        }
    }
};

#if !defined(DISTOT_NARROW_ALONE)
void soften(const Soft& soft) {
    if (soft.request.draws) sweep(Softmax{soft.request, soft});
}
#endif

void search(const Request& request) {
    if (request.draws == 0) return;
    if (request.narrow.atoms) return sweep(Candidates{request});
#if !defined(DISTOT_NARROW_ALONE)
    if (request.lists.count) return visit(Plain<true>{request});
    switch (request.g) {
        case 1: return sweep(Plain<false>{request});
        case 2: return sweep(Orbits<2>{request});
        case 4: return sweep(Orbits<4>{request});
        case 8: return sweep(Orbits<8>{request});
        case 16: return sweep(Orbits<16>{request});
    }
#endif
}

}  // namespace distot::DISTOT_ISA
