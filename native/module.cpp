// distot._native: the search for Python. Tensors come in by DLPack, nothing is copied, the GIL is free meanwhile.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "search.hpp"

namespace nb = nanobind;
using namespace nb::literals;

using Draws = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Index = nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Score = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

namespace {

typedef void (*Search)(const distot::Request&);

// Instruction sets that this machine has, best first.
std::vector<std::pair<std::string, Search>> available() {
    std::vector<std::pair<std::string, Search>> found;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.emplace_back("avx512", distot::avx512::search);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        found.emplace_back("avx2", distot::avx2::search);
#endif
    found.emplace_back("portable", distot::portable::search);
    return found;
}

void search(Draws x, Draws atoms, Vector heights, int threads, const std::string& isa, Index index, Score score) {
    const int64_t draws = x.shape(0), n = atoms.shape(0), k = index.shape(1);
    const int g = static_cast<int>(x.shape(1));
    const int64_t points = g > 1 ? 2 * g : 1;
    if (g != 1 && g != 2 && g != 4 && g != 8 && g != 16) throw std::invalid_argument("1, 2, 4, 8 or 16 blocks");
    if (x.shape(1) != atoms.shape(1) || x.shape(2) != atoms.shape(2) || int64_t(heights.shape(0)) != n)
        throw std::invalid_argument("shapes of draws, atoms and heights do not fit");
    if (int64_t(index.shape(0)) != draws * points || score.shape(0) != index.shape(0) || score.shape(1) != index.shape(1))
        throw std::invalid_argument("shapes of the outputs do not fit");
    if (k < 1 || k > n || n > INT32_MAX || threads < 1) throw std::invalid_argument("1 <= k <= n < 2^31, threads >= 1");
    for (const auto& [name, run] : available())
        if (name == isa) {
            nb::gil_scoped_release free;
            return run({x.data(), atoms.data(), heights.data(), draws, n, int64_t(x.shape(2)), g, int(k), threads,
                        index.data(), score.data()});
        }
    throw std::invalid_argument("this machine has no " + isa);
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("search", &search, "x"_a, "atoms"_a, "heights"_a, "threads"_a, "isa"_a, "index"_a, "score"_a,
          "Fills index and score (rows, k) with the best atoms of samples or orbits x (draws, g, width).");
    m.def("available", [] {
        nb::list names;
        for (const auto& entry : available()) names.append(entry.first);
        return names;
    });
}
