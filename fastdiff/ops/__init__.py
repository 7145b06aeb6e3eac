"""The fused ops. Each is one file: contract, schema, eager reference and fake implementation."""

from fastdiff.backends import cpu as _cpu
from fastdiff.backends import cuda as _cuda
from fastdiff.backends import triton as _triton
from fastdiff.ops._library import OPS as _OPS
from fastdiff.ops.adaln_modulate import adaln_modulate
from fastdiff.ops.adaln_modulate_dual import adaln_modulate_dual
from fastdiff.ops.attention import attention
from fastdiff.ops.cfg_combine import cfg_combine
from fastdiff.ops.gate_residual import gate_residual
from fastdiff.ops.gate_residual_adaln import gate_residual_adaln
from fastdiff.ops.geglu import geglu
from fastdiff.ops.gelu_tanh import gelu_tanh
from fastdiff.ops.group_norm_silu import group_norm_silu
from fastdiff.ops.qk_norm_rope import qk_norm_rope
from fastdiff.ops.rms_norm_silu import rms_norm_silu
from fastdiff.ops.scheduler_step import scheduler_step
from fastdiff.ops.swiglu import swiglu

__all__ = [
    "adaln_modulate",
    "adaln_modulate_dual",
    "attention",
    "cfg_combine",
    "gate_residual",
    "gate_residual_adaln",
    "geglu",
    "gelu_tanh",
    "group_norm_silu",
    "qk_norm_rope",
    "rms_norm_silu",
    "scheduler_step",
    "swiglu",
]

_cpu.register_kernels()
_cuda.register_kernels()
_triton.register_kernels(_OPS)
