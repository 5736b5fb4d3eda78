// distot._native: the search for Python. Tensors come in by DLPack, nothing is copied, the GIL is free meanwhile.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "search.hpp"

namespace nb = nanobind;
using namespace nb::literals;

using Draws = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Index = nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Places = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Names = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Pairs = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Sums = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Score = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

namespace {

struct Kernels {
    std::string isa;
    void (*search)(const distot::Request&);
    void (*soften)(const distot::Soft&);
    void (*narrow)(const distot::Request&);
    bool quick;  // has arithmetic in bfloat16
};

// Instruction sets that this machine has, best first.
std::vector<Kernels> available() {
    std::vector<Kernels> found;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        if (__builtin_cpu_supports("avx512bf16"))
            found.push_back(
                {"avx512", distot::avx512::search, distot::avx512::soften, distot::avx512bf16::search, true});
        else
            found.push_back({"avx512", distot::avx512::search, distot::avx512::soften, distot::avx512::search, false});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        found.push_back({"avx2", distot::avx2::search, distot::avx2::soften, distot::avx2::search, false});
#endif
    found.push_back({"portable", distot::portable::search, distot::portable::soften, distot::portable::search, false});
    return found;
}

Kernels kernels(const std::string& isa) {
    for (const Kernels& found : available())
        if (found.isa == isa) return found;
    throw std::invalid_argument("this machine has no " + isa);
}

void run(const std::string& isa, const distot::Request& request) {
    const Kernels found = kernels(isa);
    nb::gil_scoped_release free;
    (request.narrow.atoms ? found.narrow : found.search)(request);
}

void check(bool fits, const char* what) {
    if (!fits) throw std::invalid_argument(what);
}

// What both searches have in common, checked.
distot::Request request(const Draws& x, const Draws& atoms, const Vector& heights, int threads, int64_t first, bool more,
                        const Index& index, const Score& score) {
    const int64_t draws = x.shape(0), n = atoms.shape(0), k = index.shape(1);
    const int g = static_cast<int>(x.shape(1));
    const size_t points = draws * (g > 1 ? 2 * g : 1);
    check(g == 1 || g == 2 || g == 4 || g == 8 || g == 16, "1, 2, 4, 8 or 16 blocks");
    check(x.shape(1) == atoms.shape(1) && x.shape(2) == atoms.shape(2) && heights.shape(0) == atoms.shape(0),
          "shapes of draws, atoms and heights do not fit");
    check(index.shape(0) == points && score.shape(0) == points && score.shape(1) == index.shape(1),
          "shapes of the outputs do not fit");
    check(k >= 1 && (more || k <= n) && first + n < INT32_MAX && threads >= 1, "1 <= k <= n < 2^31, threads >= 1");
    return {x.data(), atoms.data(), heights.data(), draws, n, int64_t(x.shape(2)), g, int(k), threads, first, more,
            index.data(), score.data(), {}, {}};
}

void search(Draws x, Draws atoms, Vector heights, int threads, const std::string& isa, Index index, Score score,
            int64_t first, bool more) {
    run(isa, request(x, atoms, heights, threads, first, more, index, score));
}

void search_narrow(Draws x, Draws atoms, Vector heights, int threads, const std::string& isa, Index index, Score score,
                   Pairs narrow_x, Pairs narrow_atoms, Vector bound) {
    distot::Request whole = request(x, atoms, heights, threads, 0, false, index, score);
    const size_t n = atoms.shape(0);
    check(x.shape(1) == 1, "plain samples only");
    check(narrow_x.shape(0) == x.shape(0) && narrow_atoms.shape(0) == n && bound.shape(0) == n &&
              narrow_atoms.shape(1) == narrow_x.shape(1),
          "shapes of samples and atoms in bfloat16 do not fit");
    whole.narrow = {int64_t(narrow_x.shape(1)), reinterpret_cast<const uint32_t*>(narrow_x.data()),
                    reinterpret_cast<const uint32_t*>(narrow_atoms.data()), bound.data()};
    run(isa, whole);
}

void logsumexp(Draws x, Draws atoms, Vector heights, int threads, const std::string& isa, float epsilon, Sums out) {
    check(x.shape(1) == 1 && atoms.shape(1) == 1 && x.shape(2) == atoms.shape(2) && heights.shape(0) == atoms.shape(0) &&
              out.shape(0) == x.shape(0) && epsilon > 0 && threads >= 1,
          "shapes of samples, atoms, heights and output do not fit");
    const Kernels found = kernels(isa);
    const distot::Request request{x.data(), atoms.data(), heights.data(), int64_t(x.shape(0)), int64_t(atoms.shape(0)),
                                  int64_t(x.shape(2)), 1, 1, threads, 0, false, nullptr, nullptr, {}, {}};
    nb::gil_scoped_release free;
    found.soften({request, epsilon, out.data()});
}

int64_t search_lists(Draws x, Draws atoms, Vector heights, int threads, const std::string& isa, Index index, Score score,
                     bool more, Places starts, Names names, Matrix way, Vector bias, Matrix guide,
                     std::optional<Vector> limit, std::optional<Vector> ceiling) {
    distot::Request whole = request(x, atoms, heights, threads, 0, true, index, score);
    const size_t lists = bias.shape(0), draws = x.shape(0);
    check(x.shape(1) == 1, "plain samples only");
    check(lists > 0 && starts.shape(0) == lists + 1 && way.shape(0) == lists && way.shape(1) == guide.shape(1) &&
              guide.shape(0) == draws && names.shape(0) == atoms.shape(0) && (!limit || limit->shape(0) == draws) &&
              (!ceiling || ceiling->shape(0) == draws),
          "shapes of the lists do not fit");
    std::atomic<int64_t> scored{0};
    whole.more = more;
    whole.lists = {int64_t(lists), starts.data(), names.data(), int64_t(way.shape(1)), way.data(), bias.data(),
                   guide.data(), limit ? limit->data() : nullptr, ceiling ? ceiling->data() : nullptr, &scored};
    run(isa, whole);
    return scored;
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("search", &search, "x"_a, "atoms"_a, "heights"_a, "threads"_a, "isa"_a, "index"_a, "score"_a, "first"_a = 0,
          "more"_a = false,
          "Fills index and score (rows, k) with the best atoms of samples or orbits x (draws, g, width). ``first`` is the "
          "index of the first atom; with ``more`` index and score hold winners among other atoms to go on from.");
    m.def("search_lists", &search_lists, "x"_a, "atoms"_a, "heights"_a, "threads"_a, "isa"_a, "index"_a, "score"_a,
          "more"_a, "starts"_a, "names"_a, "way"_a, "bias"_a, "guide"_a, "limit"_a.none(), "ceiling"_a.none(),
          "The same for samples x (draws, 1, width) and atoms in lists, of which list c starts at starts[c]: sample s "
          "visits it if limit[s] <= <way[c], guide[s]> + bias[c] < ceiling[s], the limit by default its k-th best score so "
          "far. ``names``: indices of the atoms. Returns how many scores were computed.");
    m.def("search_narrow", &search_narrow, "x"_a, "atoms"_a, "heights"_a, "threads"_a, "isa"_a, "index"_a, "score"_a,
          "narrow_x"_a, "narrow_atoms"_a, "bound"_a,
          "The same for samples x (draws, 1, width), with candidates from rows of bfloat16 numbers, two in each of narrow_x "
          "(draws, pairs) and narrow_atoms (n, pairs). No score is above bound + their product.");
    m.def("quick", [](const std::string& isa) { return kernels(isa).quick; }, "isa"_a,
          "Whether an instruction set has arithmetic in bfloat16 on this machine.");
    m.def("logsumexp", &logsumexp, "x"_a, "atoms"_a, "heights"_a, "threads"_a, "isa"_a, "epsilon"_a, "out"_a,
          "Fills out (rows,) with epsilon log sum_i exp((<x, y_i> + h_i) / epsilon) for samples x (rows, 1, width).");
    m.def("available", [] {
        nb::list names;
        for (const auto& entry : available()) names.append(entry.isa);
        return names;
    });
}
