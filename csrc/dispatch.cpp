// Which kernels may run here, and which do.
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace tritkit {

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvxVnni, kAvx512;
#elif defined(__aarch64__)
extern const Kernels kNeon;
#endif

namespace {

// Slowest first. A new instruction set is one file and one row here.
const Kernels* const kTable[] = {
    &kScalar,
#if defined(__x86_64__)
    &kAvx2,
    &kAvxVnni,
    &kAvx512,
#elif defined(__aarch64__)
    &kNeon,
#endif
};

/// Entries that `to` does not have come from `from`.
void inherit(Kernels& to, const Kernels& from) {
    auto fill = [](auto& entry, auto inherited) {
        if (!entry) entry = inherited;
    };
    fill(to.quantize_row, from.quantize_row);
    for (int i = 0; i < kTileLayouts; ++i) fill(to.matmul_tiles[i], from.matmul_tiles[i]);
    fill(to.matmul_f32, from.matmul_f32);
    fill(to.matmul_f16, from.matmul_f16);
    fill(to.matmul_bf16, from.matmul_bf16);
    fill(to.vectors, from.vectors);
    fill(to.read_stream, from.read_stream);
    fill(to.integer_peak, from.integer_peak);

    fill(to.quantize_groups, from.quantize_groups);
    fill(to.matmul_groups, from.matmul_groups);

    fill(to.lines, from.lines);
}

const std::vector<Kernels>& available() {
    static const std::vector<Kernels> rows = [] {
        std::vector<Kernels> complete;
        for (const Kernels* row : kTable) {
            if (!row->supported()) continue;
            complete.push_back(*row);
            if (complete.size() > 1) inherit(complete.back(), complete[complete.size() - 2]);
        }
        return complete;
    }();
    return rows;
}

const Kernels& find(const std::string& isa, const std::string& source) {
    std::string names;
    for (const Kernels& row : available()) {
        if (row.isa == isa) return row;
        names += (names.empty() ? "" : ", ") + std::string(row.isa);
    }
    throw std::invalid_argument(source + " is '" + isa + "', expected one that this CPU can run: " + names);
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels& row : available()) names.emplace_back(row.isa);
    return names;
}

std::string default_isa() {
    const char* forced = std::getenv("TRITKIT_ISA");
    if (forced && *forced) return find(forced, "TRITKIT_ISA").isa;
    return available().back().isa;
}

const Kernels& kernels_for(const std::string& isa) { return find(isa.empty() ? default_isa() : isa, "isa"); }

}  // namespace tritkit
