"""Types of the compiled extension (csrc/cpu/module.cpp)."""

class Sizes:
    def __init__(
        self, *, cuts: int, sequences: int, tokens: int, heads: int, head_size: int, scale: float, causal: bool
    ) -> None: ...

# Tensors are (address, stride of a token, stride of a head), the strides in numbers; statistics is an address.
_Tensor = tuple[int, int, int]

def attend(
    sizes: Sizes, *, q: _Tensor, k: _Tensor, v: _Tensor, out: _Tensor, statistics: int, threads: int
) -> None: ...
def attend_backward(
    sizes: Sizes,
    *,
    dout: _Tensor,
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    out: _Tensor,
    statistics: int,
    dq: _Tensor,
    dk: _Tensor,
    dv: _Tensor,
    threads: int,
) -> None: ...

# All tensors contiguous, by address; a bias, or sums, of 0 are none.
def rotate(
    *,
    tokens: int,
    heads: int,
    head_size: int,
    cosines: int,
    sines: int,
    qkv: int,
    bias: int,
    q: int,
    k: int,
    v: int,
    threads: int,
) -> None: ...
def rotate_backward(
    *,
    tokens: int,
    heads: int,
    head_size: int,
    cosines: int,
    sines: int,
    dq: int,
    dk: int,
    dv: int,
    dqkv: int,
    threads: int,
) -> None: ...
def transpose(*, matrix: int, rows: int, columns: int, to: int, sums: int, threads: int) -> None: ...
def instructions() -> str: ...
def thread_pool() -> str: ...
