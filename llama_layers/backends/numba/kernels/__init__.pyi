from . import attention, decode, gemm, pointwise

__all__ = ["attention", "decode", "gemm", "pointwise"]
