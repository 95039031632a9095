"""The operator's derivatives in every mode of torch, its traces, copies and fakes. The yardstick is
the same chain as plain torch products."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torchvision.transforms import v2

from common.fused import Bands, fuse, separable_map
from common.transforms import FusedTransform, fused_transform, matmul_transform
from tests.runs import ROOT

SIZE = (4, 7)
X = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def squares(f):
    return lambda x: f(x).square().sum()


def dual(f):
    with fwd.dual_level():
        return fwd.unpack_dual(f(fwd.make_dual(X, T))).tangent


def backward_of_vmap(f):
    x = X.clone().requires_grad_()
    vmap(f)(x).square().sum().backward()
    return x.grad


MODES = {
    "jvp": lambda f: jvp(f, (X,), (T,)),
    "jacfwd": lambda f: jacfwd(f)(X),
    "jacrev": lambda f: jacrev(f)(X),
    "vjp": lambda f: vjp(f, X)[1](f(X))[0],
    "grad": lambda f: grad(squares(f))(X),
    "grad of grad": lambda f: grad(lambda y: grad(lambda x: f(x).pow(3).sum())(y).sum())(X),
    "hessian": lambda f: hessian(squares(f))(X[:1, :, :2, :2]),
    "linearize": lambda f: linearize(f, X)[1](T),
    "dual number": dual,
    "vmap": lambda f: vmap(f)(X),
    "backward of vmap": backward_of_vmap,
    "vmap of grad": lambda f: vmap(grad(squares(f)))(X),
    "vmap of jvp": lambda f: vmap(lambda x, t: jvp(f, (x,), (t,)))(X, T),
    "grad of jvp": lambda f: grad(
        lambda x: jvp(f, (x,), (T,))[1].square().sum() + squares(f)(x)
    )(X),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_derivatives_equal_plain_torch(mode):
    ours, plain = (
        MODES[mode](lambda x, f=f: f(x, SIZE)) for f in (fused_transform, matmul_transform)
    )
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)


def test_gradcheck_with_masks():
    mask = torch.tensor([True, False])

    def function(x):
        return fused_transform(x, SIZE, hflip=mask, vflip=~mask)

    x = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        function, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(function, x, check_fwd_over_rev=True)


def test_vmap_with_masks():
    images, masks = torch.rand(3, 2, 3, 6, 5), torch.rand(3, 2) > 0.5
    actual = vmap(lambda x, m: fused_transform(x, SIZE, hflip=m))(images, masks)
    each = [fused_transform(x, SIZE, hflip=m) for x, m in zip(images, masks, strict=True)]
    assert torch.equal(actual, torch.stack(each))


def test_clamp_passes_gradients_only_between_its_limits():
    x = torch.tensor([0.1, 0.3, 0.7]).view(1, 1, 3).requires_grad_()
    one = torch.ones(1, 3, 1).double()
    columns = Bands(torch.arange(3)[None], torch.ones(1, 3).long(), one, 3)
    rows = Bands(torch.zeros(1, 1).long(), torch.ones(1, 1).long(), one[:, :1], 1)
    out = separable_map(x, rows, columns, torch.eye(1), low=0.2, high=0.6)
    out.sum().backward()
    assert out.flatten().tolist() == pytest.approx([0.2, 0.3, 0.6])
    assert x.grad.flatten().tolist() == [0, 1, 0]


class Doubled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.transform = FusedTransform(SIZE)

    def forward(self, x):
        return self.transform(x * 2)


DYNAMIC = ({0: torch.export.Dim("batch", min=1)},)
TRACES = {
    "trace": lambda m, x: torch.jit.trace(m, x),
    "export": lambda m, x: torch.export.export(m, (x,)).module(),
    "export dynamic": lambda m, x: torch.export.export(m, (x,), dynamic_shapes=DYNAMIC).module(),
    "export strict": lambda m, x: torch.export.export(m, (x,), strict=True).module(),
    "decomposed": lambda m, x: torch.export.export(m, (x,)).run_decompositions().module(),
    "compile": lambda m, x: torch.compile(m, fullgraph=True, backend="aot_eager"),
}


@pytest.mark.parametrize("trace", TRACES)
def test_traces_keep_the_gradient(trace):
    def gradient(f):
        x = X.float().requires_grad_()
        f(x).square().sum().backward()
        return x.grad

    traced = TRACES[trace](Doubled(), X.float())
    torch.testing.assert_close(gradient(traced), gradient(Doubled()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", ["jvp", "grad", "dual number", "vmap"])
def test_derivatives_of_an_exported_program_are_right_or_refused(mode):
    exported = torch.export.export(Doubled().double(), (X if mode != "vmap" else X[0],)).module()
    try:
        actual = MODES[mode](exported)
    except NotImplementedError:
        return
    torch.testing.assert_close(actual, MODES[mode](Doubled()), atol=1e-12, rtol=1e-12)


def test_exported_program_loads_after_the_import_alone(tmp_path):
    path = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(Doubled(), (X.float(),)), path)
    code = (
        "import sys, torch, common.fused\n"
        "x, path = torch.rand(2, 3, 6, 5), sys.argv[1]\n"
        "y = torch.export.load(path).module()(x)\n"
        f"assert torch.equal(y, common.fused.fused_transform(x * 2, {SIZE}))\n"
    )
    subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=True)


@pytest.mark.skipif(
    torch.__version__ < (2, 14),
    reason="AOTInductor of torch 2.11 hands over other bands, which the operator refuses",
)
def test_program_compiled_ahead_of_time(tmp_path):
    exported = torch.export.export(Doubled(), (X.float(),))
    path = str(tmp_path / "program.pt2")
    torch._inductor.aoti_compile_and_package(exported, package_path=path)
    compiled = torch._inductor.aoti_load_package(path)
    assert torch.equal(compiled(X.float()), Doubled()(X.float()))


def test_compiled_call_on_a_sample():
    chain, x = v2.Resize(9), torch.rand(3, 20, 31)
    image, label = torch.compile(fuse(chain))((x, 1))
    assert label == 1
    assert torch.equal(image, fuse(chain)(x))


def test_what_is_kept_serves_after_inference_mode_and_fakes():
    with torch.inference_mode():
        fused_transform(torch.rand(1, 3, 33, 21), (5, 9))
    with FakeTensorMode() as mode:
        fake = fused_transform(mode.from_tensor(torch.rand(1, 3, 31, 23)), (5, 9))
        assert fake.shape == (1, 1, 5, 9)
    for shape in ((33, 21), (31, 23)):
        images = torch.rand(1, 3, *shape, requires_grad=True)
        fused_transform(images, (5, 9)).sum().backward()
        assert images.grad.abs().sum() > 0


def test_meta_tensors_have_the_right_shape():
    assert fused_transform(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 1, 28, 28)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8).int()])
def test_fakes_refuse_what_kernels_refuse(wrong):
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match="images must be"):
        fused_transform(mode.from_tensor(wrong))


def test_out_is_refused_where_a_derivative_is_asked_for():
    for call in (
        lambda: jvp(
            lambda x: fused_transform(x, out=torch.empty(2, 1, 28, 28).double()), (X,), (T,)
        ),
        lambda: fused_transform(X.clone().requires_grad_(), out=torch.empty(2, 1, 28, 28).double()),
    ):
        with pytest.raises(RuntimeError, match="records no gradient"):
            call()


def test_out_that_a_graph_needs_is_not_written_unnoticed():
    weight, out = torch.ones(1, requires_grad=True), torch.empty(2, 1, 28, 28).double()
    first, count, mix = torch.zeros(1, 28).long(), torch.ones(1, 28).long(), torch.ones(1, 3)
    rows, columns = (Bands(first, count, torch.ones(1, 28, 1).double(), size) for size in (6, 5))
    for write in (
        lambda: fused_transform(X, out=out),
        lambda: fused_transform(X, out=out),  # whose arguments are kept
        lambda: separable_map(X, rows, columns, mix, out=out),
        lambda: torch.compile(lambda: fused_transform(X, out=out), backend="aot_eager")(),
    ):
        loss = (weight * write()).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with torch.inference_mode():
        inner = torch.empty_like(out)
        assert torch.equal(fused_transform(X, out=inner), fused_transform(X, out=out))


def test_constants_that_want_a_gradient_are_refused():
    first, count = torch.zeros(1, 1).long(), torch.ones(1, 1).long()
    one = Bands(first, count, torch.ones(1, 1, 1).double(), 1)
    x, mix = torch.rand(1, 1, 1), torch.ones(1, 1, requires_grad=True)
    with pytest.raises(RuntimeError, match="get no gradient"):
        separable_map(x, one, one, mix)
    with torch.no_grad():
        assert separable_map(x, one, one, mix) == x


def test_copies_and_masks_that_follow_the_module():
    module = FusedTransform(SIZE, hflip=torch.tensor([True, False]))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(X), module(X))
    assert module.to("meta").hflip.is_meta
