#define DISTOT_ISA avx512bf16
#define DISTOT_NARROW_ALONE
#define LANES 16
#include "search.inl"
