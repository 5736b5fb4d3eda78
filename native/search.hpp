// Which atoms win each sample: argmax_i <x, y_i> + h_i. The search of distot/assign/native.py.
#pragma once

#include <atomic>
#include <cstdint>

namespace distot {

// Atoms grouped into lists; a plain sample visits some of them. Without lists count is 0.
// Sample s goes to list c if limit[s] <= <way[c], guide[s]> + bias[c] < ceiling[s].
struct Lists {
    int64_t count;
    const int64_t* starts;  // (count + 1): list c is atoms starts[c] to starts[c + 1]
    const int32_t* index;   // (n): what to call each atom; of equal scores the one with the lowest name wins
    int64_t width;
    const float* way;      // (count, width)
    const float* bias;     // (count)
    const float* guide;    // (draws, width)
    const float* limit;    // (draws), or null for the k-th best score that s has so far
    const float* ceiling;  // (draws), or null for none
    std::atomic<int64_t>* scored;  // out: adds up the atoms that were scored
};

// Samples and atoms in bfloat16, which find candidates for what float32 decides: the score of an atom and a sample in
// float32 is at most bound + the product of their rows, added up in whatever order. Without them atoms is null.
struct Narrow {
    int64_t pairs;          // of numbers in a row, the even one in the low half
    const uint32_t* x;      // (draws, pairs)
    const uint32_t* atoms;  // (n, pairs)
    const float* bound;     // (n)
};

// All arrays are row-major. T = 2 g points belong to a draw if g > 1, in the order of distot/orbit.py; else T = 1.
struct Request {
    const float* x;        // (draws, g, width); plain samples have g = 1 and width = d
    const float* atoms;    // (n, g, width), in the basis of the blocks
    const float* heights;  // (n)
    int64_t draws, n, width;
    int g;        // 1, 2, 4, 8 or 16 blocks
    int k;        // winners wanted, 1 <= k <= n
    int threads;  // at least 1
    int64_t first;  // index of the first atom
    bool more;      // index and score hold the winners among other atoms; go on from them
    int64_t* index;  // out: (draws T, k), best first, equal scores in the order of their indices
    float* score;    // out: (draws T, k)
    Lists lists;
    Narrow narrow;
};

// logsumexp[s] = epsilon log sum_i exp((<x_s, y_i> + h_i) / epsilon) for plain samples; of a Request it takes what they need.
struct Soft {
    const Request& request;
    float epsilon;
    double* logsumexp;  // out: (draws)
};

namespace portable { void search(const Request&); void soften(const Soft&); }
#if defined(__x86_64__)
namespace avx2 { void search(const Request&); void soften(const Soft&); }
namespace avx512 { void search(const Request&); void soften(const Soft&); }
namespace avx512bf16 { void search(const Request&); }  // narrow ones alone
#endif

}  // namespace distot
