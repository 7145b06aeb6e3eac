"""The backend "fastdiff" of Diffusers' attention dispatcher."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch import Tensor

from fastdiff import _attention_backend
from fastdiff._launches import count_launches
from fastdiff.ops import attention

pytestmark = pytest.mark.kernel


def _heads(seed: int = 0, heads: int = 4, keys: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 9, 4, 24, generator=generator) * 2
    k, v = torch.randn(2, 2, keys, heads, 24, generator=generator).mul(2)
    return q, k, v


def _stock(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **keywords: Any) -> Tensor:
    return dispatch_attention_fn(q, k, v, mask, backend=AttentionBackendName.NATIVE, **keywords)


@pytest.mark.parametrize("mask", [None, "bool 2d", "additive 4d"])
def test_dispatch(mask: str | None) -> None:
    q, k, v = _heads()
    m = None
    if mask == "bool 2d":
        m = torch.arange(11).expand(2, 11) < torch.tensor([[4], [11]])
    elif mask is not None:
        m = torch.randn(2, 1, 1, 11) * 3
    expected = _stock(q, k, v, m)

    def ours() -> Tensor:
        return dispatch_attention_fn(q, k, v, m, backend=AttentionBackendName("fastdiff"))

    torch.testing.assert_close(ours(), expected)
    assert count_launches(ours) == {"attention": 1}
    with attention_backend("fastdiff"):
        assert count_launches(lambda: dispatch_attention_fn(q, k, v, m)) == {"attention": 1}
    assert "attention" not in count_launches(lambda: dispatch_attention_fn(q, k, v, m))


def test_grouped_queries_causal_dropout_and_gradients() -> None:
    q, k, v = _heads(heads=2, keys=9)
    ours = AttentionBackendName("fastdiff")
    for keywords in ({"enable_gqa": True}, {"enable_gqa": True, "is_causal": True, "scale": 0.3}):
        expected = _stock(q, k, v, **keywords)
        torch.testing.assert_close(dispatch_attention_fn(q, k, v, backend=ours, **keywords), expected)
    q, k, v = _heads()
    torch.manual_seed(0)
    expected = _stock(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(dispatch_attention_fn(q, k, v, dropout_p=0.5, backend=ours), expected)
    gradients = []
    for backend in (AttentionBackendName.NATIVE, ours):
        leaf = q.clone().requires_grad_()
        gradients += torch.autograd.grad(dispatch_attention_fn(leaf, k, v, backend=backend).square().sum(), leaf)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_member_behaves_like_the_others() -> None:
    member = AttentionBackendName("fastdiff")
    assert member is AttentionBackendName.FASTDIFF
    assert member in list(AttentionBackendName)
    assert (member.name, member.value, str.__str__(member)) == ("FASTDIFF", "fastdiff", "fastdiff")
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member
    before = len(AttentionBackendName)
    _attention_backend.register(attention_dispatch)
    assert len(AttentionBackendName) == before


def test_compiles() -> None:
    q, k, v = _heads()
    graphs: list[str] = []

    def watch(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    def call(q: Tensor) -> Tensor:
        return dispatch_attention_fn(q, k, v, backend=AttentionBackendName.FASTDIFF) * 2

    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(call, fullgraph=True, backend=watch)(q), call(q))
    assert len(graphs) == 1
    assert "fastdiff.attention" in graphs[0]


@pytest.mark.parametrize("first", ["fastdiff", "diffusers.models.attention_dispatch"])
def test_either_import_order(first: str) -> None:
    second = ({"fastdiff", "diffusers.models.attention_dispatch"} - {first}).pop()
    _python(
        f"import sys, {first}\nassert {second!r} not in sys.modules or {second!r} == 'fastdiff'\nimport {second}\n"
        "from diffusers.models.attention_dispatch import _AttentionBackendRegistry as r, AttentionBackendName as n\n"
        "assert n.FASTDIFF in r._backends\nassert r._active_backend == 'native'\n"
        "assert not any('fastdiff' in type(f).__module__ for f in sys.meta_path)\n"
    )


def test_without_diffusers_and_with_another_one() -> None:
    _python(
        "import sys\nsys.modules['diffusers'] = None\nimport fastdiff\n"
        "try: import diffusers.models.attention_dispatch\nexcept ImportError: pass\nelse: raise SystemExit(1)\n"
    )
    other = ModuleType("diffusers.models.attention_dispatch")
    with pytest.warns(RuntimeWarning, match="does not take the attention backend 'fastdiff'"):
        _attention_backend.register(other)


_RANK = """
import os, sys, torch, torch.distributed as dist
import fastdiff
from diffusers import ContextParallelConfig
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models._modeling_parallel import ParallelConfig

rank, kind = int(sys.argv[1]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
shape = (2, 1) if kind == "ring" else (1, 2)
mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=("ring", "ulysses"))
context = ContextParallelConfig(**{kind + "_degree": 2})
config = ParallelConfig(context_parallel_config=context)
config.setup(rank, 2, torch.device("cpu"), mesh=mesh)
q, k, v = torch.load(sys.argv[4])
mine = [t.chunk(2, 1)[rank] for t in (q, k, v)]
with torch.no_grad():
    out = dispatch_attention_fn(*mine, backend="fastdiff", parallel_config=config)
torch.save(out.contiguous(), sys.argv[5] + str(rank))
# Both have what they need of each other. gloo's threads sometimes abort the process as it ends ("terminate called
# without an active exception"), which says nothing of the result: leave without that.
done = dist.FileStore(sys.argv[2] + ".done", 2)
done.set(str(rank), "")
done.wait(["0", "1"])
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_context_parallel(tmp_path: Path, kind: str) -> None:
    """Two gloo processes with half of the sequence each, against one process with all of it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 14, 4, 24, generator=generator).mul(2)
    torch.save((q, k, v), tmp_path / "in.pt")
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    arguments = [str(tmp_path / "store"), kind, str(tmp_path / "in.pt"), str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(rank), *arguments], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=600)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    out = torch.cat([torch.load(tmp_path / f"out{rank}") for rank in range(2)], 1)
    exact = F.scaled_dot_product_attention(*(t.transpose(1, 2).double() for t in (q, k, v))).transpose(1, 2)

    def error(t: Tensor) -> float:
        return ((t.double() - exact).norm() / exact.norm()).item()

    assert error(out) <= 2 * error(attention(q, k, v)), (error(out), error(attention(q, k, v)))


def test_context_parallel_has_no_backward() -> None:
    with pytest.raises(NotImplementedError, match="no backward"):
        _attention_backend._backward_op(None)


def _python(code: str) -> None:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
