#if defined(__x86_64__)
#include "kernels.h"
namespace tritkit {
extern const Kernels kAvx2;
const Kernels kAvx2 = {"avx2", [] { return false; }, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
}
#endif
