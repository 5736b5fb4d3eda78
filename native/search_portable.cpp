#define DISTOT_ISA portable
#define LANES 4
#include "search.inl"
