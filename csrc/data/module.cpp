// Python bindings of the data helpers: megatron_plm.data._native (typed in megatron_plm/data/_native.pyi).

#include "bindings.h"

PYBIND11_MODULE(_native, module) {
    module.doc() = "The data path's inner loops.";
    megatron_plm::bind_fasta(module);
    megatron_plm::bind_hashing(module);
    megatron_plm::bind_lines(module);
    megatron_plm::bind_rows(module);
}
