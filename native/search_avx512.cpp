#define DISTOT_ISA avx512
#define LANES 16
#include "search.inl"
