"""Searches on a device other than the CPU that lacks what Macs lack.

The device is simulated. Its tensors are on torch's device "meta", but hold values on the CPU, which
every operation is computed with. It has the operations that `native_functions.yaml` of the
installed PyTorch lists for MPS, and no others, neither numbers of 64 bits nor complex ones, and no
operation with a tensor that was left on the CPU.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES, CustomTextCLIP, make_clip
from torch._C import DispatchKey
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from pez_core import (
    JointClip,
    SearchOptions,
    Vocabulary,
    baselines,
    distill,
    explain,
    fuse,
    invert,
    style,
)
from pez_core.clip.images import load_image

DEVICE = torch.device("meta")
MISSING = (torch.float64, torch.complex64, torch.complex128)
COMPOSITE = (
    DispatchKey.CompositeExplicitAutograd,
    DispatchKey.CompositeExplicitAutogradNonFunctional,
)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
# MPS has them in newer versions than PyTorch 2.6, the oldest one that is supported.
LATER = {
    *("_assert_async", "_assert_async.msg", "_cdist_backward", "_unique", "angle"),
    *("_compute_linear_combination", "_compute_linear_combination.out", "_cholesky_solve_helper"),
    *("_linalg_eigh", "_linalg_eigh.eigenvalues", "_linalg_svd", "_linalg_svd.U", "geqrf"),
    *("geqrf.a", "linalg_lstsq.out", "linalg_lu_solve", "linalg_lu_solve.out"),
    *("linalg_matrix_exp", "linalg_polar", "linalg_polar.out", "linalg_qr", "linalg_qr.out"),
    *("_sample_dirichlet", "_standard_gamma", "binomial", "poisson"),
    *("index_copy", "index_copy_", "index_reduce", "index_reduce.out", "index_reduce_"),
    *("lcm", "lcm.out", "lcm_", "nonzero_static", "nonzero_static.out"),
    *("rsub.Tensor", "unique_dim"),
    *("isin.Tensor_Tensor", "isin.Tensor_Tensor_out"),  # of int64; they need macOS 14
}


@cache
def on_mps() -> frozenset[str]:
    """The operations with a kernel for MPS, with their overload."""
    torchgen = pytest.importorskip("torchgen")
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    kernels: dict[str, bool] = {}
    delegates: dict[str, str] = {}
    for entry in path.read_text("utf-8").split("\n- func: ")[1:]:
        name = entry[: entry.index("(")]
        kernels[name] = bool(re.search(r"^    [\w, ]*\bMPS\b[\w, ]*:", entry, re.MULTILINE))
        if found := re.search(r"^  structured_delegate: ([\w.]+)", entry, re.MULTILINE):
            delegates[name] = found[1]
    names = {name for name, here in kernels.items() if here}
    names |= {name for name, other in delegates.items() if kernels[other]}
    assert "_mps_convolution" in names
    # convolutions are chosen by device; a view needs no kernel
    return frozenset(names - LATER | {"convolution", "_unsafe_view"})


class There(torch.Tensor):
    """A tensor on the device."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> There:
        if raw.dtype in MISSING:
            raise TypeError(f"the device has no {raw.dtype}")
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        self.raw = raw
        return self

    def tolist(self):
        return self.raw.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the device")


@cache
def _is_view(func) -> bool:
    """Whether an operation gives other sizes and strides to the same values."""
    aliases = [one.alias_info for one in func._schema.returns]
    return any(one is not None and not one.is_write for one in aliases)


@cache
def _tensors(func) -> tuple[bool, ...]:
    """Which arguments of an operation are tensors."""
    return tuple(str(one.type) == "Tensor" for one in func._schema.arguments)


class _Factories(TorchFunctionMode):
    """Gives values to new tensors of data, which on "meta" have none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.new_tensor and args[0].device == DEVICE:
            return torch.tensor(args[1], dtype=args[0].dtype).to(DEVICE)
        if func is torch.tensor and kwargs.get("device") not in (None, torch.device("cpu")):
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


class Device(TorchDispatchMode):
    """Computes what is on the device, and counts the operations.

    Args:
        hidden: further operations that it lacks.
    """

    def __init__(self, hidden: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self._has = on_mps() - set(hidden)
        self._hidden = hidden

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves, tree = tree_flatten((args, kwargs))
        here = [one for one in leaves if isinstance(one, There)]
        goal = kwargs.get("device")
        if not here and (goal is None or torch.device(goal) != DEVICE):
            return func(*args, **kwargs)
        name = func.name().removeprefix("aten::")
        self.operations[name] += 1
        if here and func not in COPIES:  # without one it makes a new tensor
            self._check_devices(name, leaves)
            if name not in self._has and not _is_view(func):
                with self, torch._C.DisableTorchFunction():
                    return self._decomposed(func, name, args, kwargs)
        raws = [one.raw if isinstance(one, There) else one for one in leaves]
        raws = [torch.device("cpu") if one == DEVICE else one for one in raws]
        args, kwargs = tree_unflatten(raws, tree)
        # a number in place of a tensor is for another overload
        pairs = zip(_tensors(func), args, strict=False)
        if any(wanted and type(one) in (int, float) for wanted, one in pairs):
            func = func.overloadpacket
        found = func(*args, **kwargs)
        if goal is not None and torch.device(goal) != DEVICE:
            return found
        if func is torch.ops.aten.copy_.default and not isinstance(leaves[0], There):
            return leaves[0]
        known = {id(one.raw): one for one in here}  # what an operation changes in place

        def there(one):
            return known[id(one)] if id(one) in known else There(one)

        if isinstance(found, torch.Tensor):
            return there(found)
        return tree_map_only(torch.Tensor, there, found)

    def _decomposed(self, func, name, args, kwargs):
        """An operation that is made of others on every device."""
        if name not in self._hidden:
            for key in COMPOSITE:
                if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key.name):
                    return func._op_dk(key, *args, **kwargs)
            found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        raise NotImplementedError(f"The operator 'aten::{name}' is not implemented on the device")

    @staticmethod
    def _check_devices(name, leaves):
        # indices and single numbers may be anywhere
        if "index" not in name and any(
            isinstance(one, torch.Tensor) and not isinstance(one, There) and one.ndim
            for one in leaves
        ):
            raise RuntimeError(f"{name}: tensors on two devices")


def options(**fields) -> SearchOptions:
    return SearchOptions(**{"prompt_len": 4, "steps": 3, "swaps": 5, "effort": "fast"} | fields)


@pytest.fixture(scope="module")
def pictures():
    return [load_image(path) for path in EXAMPLES[:3]]


PHRASES = Vocabulary(only=["red fish", "blue bird", "green", "tall tree"])
SEARCHES = {
    "free": lambda c, p: invert(c, p[0], options()),
    "sentence": lambda c, p: invert(c, p[0], options(wording="sentence", steps=None)),
    "style": lambda c, p: [style(c, p, options(prompt_len=2))],
}
MORE = {
    "restarts": lambda c, p: invert(c, p, options(restarts=2, patience=2, batch_size=2)),
    "repeats": lambda c, p: invert(c, p, options(repeats=True, block_unsafe=False)),
    "phrases": lambda c, p: invert(c, p, options(vocabulary=PHRASES)),
    "tags": lambda c, p: invert(
        c, p, options(wording="tags", steps=None), caption="a photo of {}, red"
    ),
    "long caption": lambda c, p: invert(c, p[0], options(), caption="a red fish " * 30 + "{}"),
    "readability": lambda c, p: invert(c, p[0], options(readability=0.5)),
    "paper": lambda c, p: invert(c, p[0], options(effort="paper", swaps=None, trajectory=True)),
    "avoid": lambda c, p: invert(c, p, options(), avoid=["a cat", p[1]]),
    "shared": lambda c, p: invert(c, p, options(), shared=True),
    "style of a few": lambda c, p: [
        style(c, p, options(), keep_content=True, images_per_step=2, content="a fish")
    ],
    "fuse": lambda c, p: [fuse(c, ["a fish", p[0]], options(), weights=[1, 2], always_learn=True)],
    "gcg": lambda c, p: invert(
        c, p[0], options(swaps=0, method=partial(baselines.gcg, topk=8, width=4))
    ),
    "words": lambda c, p: explain(c, "a red fish", p[0]) and invert(c, p[0], options(swaps=0)),
}


def check(name, pictures, make=make_clip):
    """Run a search on the device."""
    with _Factories(), Device() as device:
        results = (SEARCHES | MORE)[name](make().to(DEVICE), pictures)
    assert device.operations["mm"] + device.operations["addmm"] > 10
    for one in results:
        assert one.prompt and -1 <= one.similarity <= 1


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_needs_no_operation_that_the_device_lacks(name, pictures):
    check(name, pictures)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_no_search_needs_an_operation_that_the_device_lacks(name, pictures):
    check(name, pictures)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["free", "sentence"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: JointClip([make_clip(), make_clip(seed=1)]),
        lambda: make_clip(CustomTextCLIP, text={"no_causal_mask": True, "pool_type": "last"}),
        lambda: make_clip(CustomTextCLIP, text={"embed_cls": True, "context_length": 76}),
    ],
    ids=["two encoders", "no causal mask", "class token"],
)
def test_other_towers_need_none_either(name, make, pictures):
    check(name, pictures, make)


def test_the_device_finds_what_the_cpu_finds(tiny_clip):
    text = "a large green fish in the deep sea"
    here = distill(tiny_clip, text, options())
    with _Factories(), Device():
        elsewhere = distill(make_clip().to(DEVICE), text, options())
    assert elsewhere.prompt == here.prompt
    assert elsewhere.similarity == pytest.approx(here.similarity, abs=1e-4)


def test_the_device_refuses_what_macs_refuse():
    with _Factories(), Device(hidden=("topk",)) as device:
        x = torch.ones(3, 2).to(DEVICE)
        assert isinstance(x, There) and x.device == DEVICE
        assert (x + 1).sum().item() == 12 and x.cpu().tolist() == [[1, 1]] * 3
        for name, call in (
            ("_linalg_svd.U", lambda: torch.linalg.svd(x)),
            ("topk", lambda: x.topk(1)),
        ):
            with pytest.raises(NotImplementedError, match=f"'aten::{name}'"):
                call()
        for call in (x.double, lambda: torch.zeros(1, dtype=torch.float64, device=DEVICE)):
            with pytest.raises(TypeError, match=r"no torch\.float64"):
                call()
        with pytest.raises(RuntimeError, match=r"add\.Tensor: tensors on two devices"):
            x + torch.ones(3, 2)
    assert device.operations["topk"] == 1
