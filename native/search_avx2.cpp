#define DISTOT_ISA avx2
#define LANES 8
#include "search.inl"
