#if defined(__x86_64__)
#include "kernels.h"
namespace tritkit {
extern const Kernels kAvx512;
const Kernels kAvx512 = {"avx512", [] { return false; }, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
}
#endif
