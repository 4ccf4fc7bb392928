// Python bindings of the CPU kernels: megatron_plm.kernels._cpu (typed in megatron_plm/kernels/_cpu.pyi).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>

#include "attention.h"
#include "instructions.h"
#include "rotary.h"
#include "threads.h"
#include "transpose.h"

namespace py = pybind11;

namespace megatron_plm {

namespace {

// Address, stride of a token and of a head, in numbers.
using Tensor = std::array<std::int64_t, 3>;

template <typename Value>
Strided<Value> strided(const Tensor& tensor) {
    return {reinterpret_cast<Value*>(tensor[0]), tensor[1], tensor[2]};
}

// `cuts` is the address of int32 [sequences + 1], from 0 to the number of tokens.
struct Sizes {
    std::int64_t cuts, sequences, tokens, heads, head_size;
    float scale;
    bool causal;

    Shape checked() const {
        const Shape shape{reinterpret_cast<const std::int32_t*>(cuts), sequences, heads, head_size, scale, causal};
        if (sequences < 0 || shape.cuts[0] != 0 || shape.cuts[sequences] != tokens) {
            throw std::invalid_argument("cu_seqlens: not from 0 to the number of tokens");
        }
        for (std::int64_t i = 0; i < sequences; ++i) {
            if (shape.cuts[i + 1] < shape.cuts[i]) throw std::invalid_argument("cu_seqlens: falling");
        }
        return shape;
    }
};

void forward(const Sizes& sizes, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
             std::int64_t statistics, int threads) {
    const Shape shape = sizes.checked();
    float* maxima = reinterpret_cast<float*>(statistics);
    float* sums = maxima + sizes.heads * sizes.tokens;
    const Forward tensors{strided<const float>(q), strided<const float>(k), strided<const float>(v), strided<float>(out),
                          maxima, sums};
    const py::gil_scoped_release release;
    attend(shape, tensors, threads);
}

void backward(const Sizes& sizes, const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& out, std::int64_t statistics, const Tensor& dq, const Tensor& dk, const Tensor& dv,
              int threads) {
    const Shape shape = sizes.checked();
    const float* maxima = reinterpret_cast<const float*>(statistics);
    const float* sums = maxima + sizes.heads * sizes.tokens;
    const Backward tensors{strided<const float>(q),    strided<const float>(k), strided<const float>(v),
                           strided<const float>(out),  strided<const float>(dout), maxima, sums,
                           strided<float>(dq),         strided<float>(dk), strided<float>(dv)};
    const py::gil_scoped_release release;
    attend_backward(shape, tensors, threads);
}

// Addresses of contiguous tensors.
using Address = std::int64_t;

template <typename Value>
Value* at(Address address) {
    return reinterpret_cast<Value*>(address);
}

Turn turn(std::int64_t tokens, std::int64_t heads, std::int64_t head_size, Address cosines, Address sines) {
    return {tokens, heads, head_size, at<const float>(cosines), at<const float>(sines)};
}

void rotate_all(std::int64_t tokens, std::int64_t heads, std::int64_t head_size, Address cosines, Address sines,
                Address qkv, Address bias, Address q, Address k, Address v, int threads) {
    const py::gil_scoped_release release;
    rotate(turn(tokens, heads, head_size, cosines, sines), at<const float>(qkv), at<const float>(bias), at<float>(q),
           at<float>(k), at<float>(v), threads);
}

void rotate_all_backward(std::int64_t tokens, std::int64_t heads, std::int64_t head_size, Address cosines, Address sines,
                         Address dq, Address dk, Address dv, Address dqkv, int threads) {
    const py::gil_scoped_release release;
    rotate_backward(turn(tokens, heads, head_size, cosines, sines), at<const float>(dq), at<const float>(dk),
                    at<const float>(dv), at<float>(dqkv), threads);
}

void transpose_matrix(Address matrix, std::int64_t rows, std::int64_t columns, Address to, Address sums, int threads) {
    const py::gil_scoped_release release;
    transpose({at<const float>(matrix), rows, columns}, at<float>(to), at<float>(sums), threads);
}

}  // namespace

}  // namespace megatron_plm

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "Kernels for the CPU.";
    py::class_<megatron_plm::Sizes>(module, "Sizes", "Of one call: see csrc/cpu/attention.h.")
        .def(py::init([](std::int64_t cuts, std::int64_t sequences, std::int64_t tokens, std::int64_t heads,
                         std::int64_t head_size, float scale, bool causal) {
                 return megatron_plm::Sizes{cuts, sequences, tokens, heads, head_size, scale, causal};
             }),
             py::kw_only(), py::arg("cuts"), py::arg("sequences"), py::arg("tokens"), py::arg("heads"),
             py::arg("head_size"), py::arg("scale"), py::arg("causal"));
    module.def("attend", &megatron_plm::forward, py::arg("sizes"), py::kw_only(), py::arg("q"), py::arg("k"),
               py::arg("v"), py::arg("out"), py::arg("statistics"), py::arg("threads"));
    module.def("attend_backward", &megatron_plm::backward, py::arg("sizes"), py::kw_only(), py::arg("dout"),
               py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("statistics"), py::arg("dq"),
               py::arg("dk"), py::arg("dv"), py::arg("threads"));
    module.def("rotate", &megatron_plm::rotate_all, py::kw_only(), py::arg("tokens"), py::arg("heads"),
               py::arg("head_size"), py::arg("cosines"), py::arg("sines"), py::arg("qkv"), py::arg("bias"), py::arg("q"),
               py::arg("k"), py::arg("v"), py::arg("threads"));
    module.def("rotate_backward", &megatron_plm::rotate_all_backward, py::kw_only(), py::arg("tokens"),
               py::arg("heads"), py::arg("head_size"), py::arg("cosines"), py::arg("sines"), py::arg("dq"),
               py::arg("dk"), py::arg("dv"), py::arg("dqkv"), py::arg("threads"));
    module.def("transpose", &megatron_plm::transpose_matrix, py::kw_only(), py::arg("matrix"), py::arg("rows"),
               py::arg("columns"), py::arg("to"), py::arg("sums"), py::arg("threads"));
    module.def("instructions", &megatron_plm::instructions);
    module.def("thread_pool", &megatron_plm::thread_pool);
}
