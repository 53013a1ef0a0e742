// Code between ISA_BEGIN("avx2,fma") and ISA_END may use these instructions; the rest of the file may not.
// No standard library templates inside: an instance made there would be shared with baseline code.
#pragma once

#define TRITKIT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define ISA_BEGIN(features) TRITKIT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define ISA_END TRITKIT_PRAGMA(clang attribute pop)
#else
#define ISA_BEGIN(features) TRITKIT_PRAGMA(GCC push_options) TRITKIT_PRAGMA(GCC target(features))
#define ISA_END TRITKIT_PRAGMA(GCC pop_options)
#endif

#define TRITKIT_INLINE static inline __attribute__((always_inline))
