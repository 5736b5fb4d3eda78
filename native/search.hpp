// Which atoms win each sample: argmax_i <x, y_i> + h_i. The search of distot/assign/native.py.
#pragma once

#include <cstdint>

namespace distot {

// All arrays are row-major. T = 2 g points belong to a draw if g > 1, in the order of distot/orbit.py; else T = 1.
struct Request {
    const float* x;        // (draws, g, width); plain samples have g = 1 and width = d
    const float* atoms;    // (n, g, width), in the basis of the blocks
    const float* heights;  // (n)
    int64_t draws, n, width;
    int g;        // 1, 2, 4, 8 or 16 blocks
    int k;        // winners wanted, 1 <= k <= n
    int threads;  // at least 1
    int64_t* index;  // out: (draws T, k), best first, equal scores in the order of their indices
    float* score;    // out: (draws T, k)
};

namespace portable { void search(const Request&); }
#if defined(__x86_64__)
namespace avx2 { void search(const Request&); }
namespace avx512 { void search(const Request&); }
#endif

}  // namespace distot
