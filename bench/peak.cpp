// GFLOP/s of a bare loop of fused multiply-adds on one core, twelve independent vectors of the widest registers.
#include <chrono>
#include <cstdio>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float V __attribute__((vector_size(LANES * 4)));

int main() {
    V a[12], x = V{} + 1.0000001f, y = V{} + 1e-9f;
    for (int i = 0; i < 12; ++i) a[i] = V{} + float(i);
    double best = 0;
    for (int repeat = 0; repeat < 5; ++repeat) {
        const long rounds = 20000000;
        const auto began = std::chrono::steady_clock::now();
        for (long k = 0; k < rounds; ++k)
#pragma GCC unroll 12
            for (int i = 0; i < 12; ++i) a[i] = a[i] * x + y;
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
        const double rate = 2e-9 * rounds * 12 * LANES / seconds;
        if (rate > best) best = rate;
    }
    float sum = 0;
    for (int i = 0; i < 12; ++i) sum += a[i][0];
    fprintf(stderr, "%g\n", sum);  // so that the loop is not left out
    printf("%.1f\n", best);
}
