// Only bindings*.cpp know Python. They check dtypes, shapes and contiguity and raise ValueError; they compute nothing
// but in the hooks for the tests.
#include "bindings.h"

#include "machine.h"

using namespace tritkit;

NB_MODULE(_native, m) {
    m.doc() = "The native engine of tritkit. tritkit.engine.native is its face.";
    m.def("available_isas", &available_isas, "Instruction sets with kernels that this CPU can run, slowest first.");
    m.def("default_isa", &default_isa, "TRITKIT_ISA, or the fastest available one.");
    m.def("usable_cores", &usable_cores, "Cores that this process may run on.");

    nb::class_<Runner>(m, "Runner", "Threads and kernels.")
        .def(nb::init<int, const std::string&, const std::string&>(), "threads"_a = 0, "isa"_a = "", "layout"_a = "")
        .def_prop_ro("threads", [](const Runner& r) { return r.pool.size(); })
        .def_prop_ro("isa", [](const Runner& r) { return r.kernels.isa; })
        .def_prop_ro("tiles", [](const Runner& r) { return facts(tile_layout(r.ternary.tiles)).name; });

    m.def("integer_peak", &integer_peak, "runner"_a, "seconds"_a, Release(),
          "Gop/s of each thread, while all of them multiply codes in registers for about so long.");
    nb::class_<MemoryReader>(m, "MemoryReader", "A buffer of so many bytes, to be read from memory.")
        .def(nb::init<std::shared_ptr<Runner>, size_t>(), "runner"_a, "bytes"_a, Release())
        .def("read", &MemoryReader::pass, "streams"_a, "ahead"_a, Release(), "GB/s of one pass over the buffer.");

    m.def(
        "product_seconds",
        [](Runner& runner, const std::vector<std::shared_ptr<Linear>>& linears, int tokens, int passes) {
            return product_seconds(runner, {linears.begin(), linears.end()}, tokens, passes);
        },
        "runner"_a, "linears"_a, "tokens"_a, "passes"_a, Release(),
        "Seconds of one product, for each pass over linears of one shape.");

    bind_linears(m);
    bind_decoder(m);
    bind_quantizers(m);
    bind_hooks(m);
}
