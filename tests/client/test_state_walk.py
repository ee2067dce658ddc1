from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch
from state_snapshots import bits, keep, save
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ckptd.errors import StateNotEncodable
from ckptd.format.tree import TensorRef, encode_tree
from ckptd_client.state import FenceClass, StateWalker, optimizers_in, walk_state


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    model(torch.randn(6, 4)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def fences(state, fenced=None) -> dict[str, str]:
    return {leaf.name: leaf.fence.value for leaf in walk_state(state, fenced).leaves}


def names(state) -> list[str]:
    return [leaf.name for leaf in walk_state(state).leaves]


def test_names_are_those_of_the_modules():
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    found = names({"model": model, "optim": optimizer})
    assert "model.0.weight" in found
    assert "model.1.running_mean" in found
    assert "optim.state.0.weight.exp_avg" in found
    assert "optim.state.2.bias.step" in found


def test_leaves_share_storage_with_what_the_program_holds():
    model = small_model()
    leaves = {leaf.name: leaf for leaf in walk_state({"model": model}).leaves}
    leaf = leaves["model.0.weight"]
    assert leaf.outer is model[0].weight
    assert leaf.tensor.data_ptr() == model[0].weight.data_ptr()
    assert type(leaf.tensor) is torch.Tensor
    assert not leaf.tensor.requires_grad
    version = leaf.outer._version
    with torch.no_grad():
        model[0].weight.add_(1)
    assert leaf.outer._version > version


def test_a_walk_of_a_fresh_optimizer_creates_no_state():
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    walk = walk_state({"model": model, "optim": optimizer})
    assert not optimizer.state
    assert not any(leaf.name.startswith("optim.state") for leaf in walk.leaves)


def test_owned_frozen_declared_and_the_rest_are_told_apart():
    model, ema = small_model(), small_model().requires_grad_(False)
    model[2].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[0].parameters())
    step(model, optimizer)
    plain = torch.zeros(3)
    found = fences({"model": model, "optim": optimizer, "ema": ema, "plain": plain}, {"ema": ema})
    assert found["model.0.weight"] == "owned"
    assert found["optim.state.0.weight.exp_avg"] == found["optim.state.0.weight.step"] == "owned"
    assert found["model.2.weight"] == "frozen"
    assert found["model.1.weight"] == "rest"
    assert found["model.1.running_mean"] == found["model.1.num_batches_tracked"] == "rest"
    assert {fence for name, fence in found.items() if name.startswith("ema.")} == {"declared"}
    assert found["plain"] == "rest"


def test_owned_leaves_know_their_optimizer():
    gen, disc = small_model(), small_model()
    optimizers = {"gen": torch.optim.AdamW(gen.parameters()), "disc": torch.optim.SGD(disc.parameters(), momentum=0.9)}
    step(gen, optimizers["gen"])
    step(disc, optimizers["disc"])
    state = {"gen": gen, "disc": disc, "optims": optimizers}
    owners = {leaf.name: leaf.optimizer for leaf in walk_state(state).leaves}
    assert owners["gen.0.weight"] is owners["optims.gen.state.0.weight.exp_avg"] is optimizers["gen"]
    assert owners["disc.0.weight"] is owners["optims.disc.state.0.weight.momentum_buffer"] is optimizers["disc"]
    assert owners["gen.1.running_mean"] is None
    assert optimizers_in(state) == [optimizers["gen"], optimizers["disc"]]


def test_a_lora_base_is_frozen_and_its_adapters_are_owned():
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(4, 4).requires_grad_(False)
            self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    model = Lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    step(model, optimizer)
    found = fences({"model": model, "optim": optimizer})
    assert found["model.base.weight"] == "frozen"
    assert found["model.a.weight"] == found["optim.state.a.weight.exp_avg"] == "owned"
    assert "optim.state.base.weight.exp_avg" not in found


@pytest.mark.parametrize("shape", ["tensor", "list", "dict", "module", "stateful"])
def test_fenced_takes_tensors_in_any_shape(shape):
    module = nn.Linear(2, 2)

    class Ema:
        def state_dict(self):
            return {"shadow": {k: v.detach() for k, v in module.state_dict().items()}}

        def load_state_dict(self, state):
            module.load_state_dict(state["shadow"])

    tensors = list(module.parameters())
    ema = Ema()
    fenced = {
        "tensor": {"a": tensors[0], "b": tensors[1]},
        "list": {"ema": tensors},
        "dict": {"ema": {"x": {"y": tensors}}},
        "module": {"ema": module},
        "stateful": {"ema": ema},
    }[shape]
    assert set(fences({"ema": module}, fenced).values()) == {"declared"}
    assert set(fences({"ema": ema}, fenced).values()) == {"declared"}


def test_detached_views_of_owned_tensors_are_owned_too():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters())

    class Wrapper:
        def state_dict(self):
            return model.state_dict()

        def load_state_dict(self, state):
            model.load_state_dict(state)

    found = fences({"model": Wrapper(), "optim": optimizer, "modules": [model]})
    assert found["model.0.weight"] == "owned"
    assert found["model.1.running_mean"] == "rest"


def test_tied_weights_have_a_leaf_under_every_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    leaves = {leaf.name: leaf for leaf in walk_state({"model": model, "again": model}).leaves}
    assert set(leaves) == {"model.embed.weight", "model.head.weight", "again.embed.weight", "again.head.weight"}
    assert len({leaf.tensor.data_ptr() for leaf in leaves.values()}) == 1


def test_wrapped_and_unwrapped_models_have_the_same_names():
    model = small_model()
    plain = names({"model": model, "optim": torch.optim.SGD(model.parameters())})

    class DistributedDataParallel(nn.Module):  # told by its name, so that no process group is needed to test it
        def __init__(self, module):
            super().__init__()
            self.module = module

    wrapped = [nn.DataParallel(model), DistributedDataParallel(model), torch.compile(model)]
    wrapped.append(DistributedDataParallel(torch.compile(model)))
    for outer in wrapped:
        assert names({"model": outer, "optim": torch.optim.SGD(outer.parameters())}) == plain
    inside = nn.Sequential(torch.compile(model), DistributedDataParallel(small_model()))
    assert names({"model": inside})[:1] == ["model.0.0.weight"]
    assert "model.1.0.weight" in names({"model": inside})


def test_a_module_called_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(1, 1)})
    assert names({"m": model}) == ["m.module.weight", "m.module.bias"]


def test_parameters_of_no_tracked_module_are_named_by_position():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([{"params": [a]}, {"params": [b]}])
    a.grad, b.grad = torch.ones(2), torch.ones(3)
    optimizer.step()
    assert "optim.state.group1.param0.exp_avg" in names({"optim": optimizer})


def test_an_optimizer_over_two_modules_uses_their_paths():
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizer = torch.optim.SGD([*a.parameters(), *b.parameters()], momentum=0.9)
    a(b(torch.ones(1, 1))).sum().backward()
    optimizer.step()
    found = names({"a": a, "b": b, "optim": optimizer})
    assert "optim.state.a.weight.momentum_buffer" in found
    assert "optim.state.b.weight.momentum_buffer" in found


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(StateNotEncodable, match=r"saved as x\.y"):
        walk_state({"x": {"y": torch.zeros(1)}, "x.y": torch.zeros(1)})


def test_plain_values_stand_in_the_tree_and_their_tensors_as_references():
    walk = walk_state({"step": 3, "hist": [1.5, torch.zeros(2), {"a": (torch.ones(1), "x")}], 7: None})
    assert walk.tree == {
        "step": 3,
        "hist": [1.5, TensorRef("hist.1"), {"a": (TensorRef("hist.2.a.0"), "x")}],
        7: None,
    }


def test_what_the_tree_cannot_carry_is_refused_with_its_path():
    class Loader:
        def state_dict(self):
            return {"sampler": {"fn": print}}

        def load_state_dict(self, state): ...

    with pytest.raises(StateNotEncodable, match=r"^loader\.sampler\.fn: <class 'builtin"):
        encode_tree(walk_state({"loader": Loader()}).tree)


def awkward_tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "transposed": base.t(),
        "strided": base[::2, 1::2],
        "expanded": torch.ones(3, 1).expand(3, 5),
        "zero_d": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "bf16": base.bfloat16(),
        "fp8": base.to(torch.float8_e4m3fn),
        "bool": base > 3,
        "uint16": torch.tensor([1, 2], dtype=torch.uint16),
        "complex": torch.randn(3, dtype=torch.complex64),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "neg": torch.randn(3, dtype=torch.complex64).conj().imag,
        "buffer": nn.Buffer(torch.ones(2)),
    }


@pytest.mark.parametrize("name", awkward_tensors())
def test_awkward_tensors_are_leaves_with_their_values(name):
    tensor = awkward_tensors()[name]
    walker = StateWalker({"x": tensor})
    for _ in range(2):
        (leaf,) = walker.walk().leaves
        assert type(leaf.tensor) is torch.Tensor
        assert leaf.global_shape == tuple(tensor.shape)
        assert leaf.offset == (0,) * tensor.dim()
        assert bits(leaf.tensor) == bits(tensor.detach().resolve_conj().resolve_neg())
        assert not leaf.tensor.is_conj()
        assert not leaf.tensor.is_neg()


def refused_tensors() -> dict[str, object]:
    with FakeTensorMode():
        fake = torch.zeros(2)

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        def __tensor_flatten__(self):
            return ["inner"], None

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    return {
        "sparse": torch.eye(2).to_sparse(),
        "csr": torch.eye(2).to_sparse_csr(),
        "nested": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        "jagged": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "meta": torch.zeros(2, device="meta"),
        "fake": fake,
        "wrapper": Wrapper(torch.zeros(2)),
        "chalf": torch.zeros(2, dtype=torch.complex32),
        "lazy": nn.LazyLinear(3),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["sparse", "csr", "nested", "jagged", "quantized", "meta", "fake", "wrapper", "chalf", "lazy"]
)
def test_tensors_whose_bytes_cannot_be_taken_are_refused_by_path(name):
    with pytest.raises(StateNotEncodable, match=r"^a\.b") as caught:
        walk_state({"a": {"b": refused_tensors()[name]}})
    assert caught.value.hint


def test_fsdp1_is_refused_because_its_state_dict_is_a_collective():
    class FullyShardedDataParallel(nn.Linear): ...

    with pytest.raises(StateNotEncodable, match="FSDP1"):
        walk_state({"model": FullyShardedDataParallel(1, 1)})


def test_a_second_walk_sees_every_change():
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optim": optimizer, "n": 1}
    walker = StateWalker(state)
    walker.walk()
    step(model, optimizer)
    model[0].weight.data = torch.full((8, 4), 7.0)
    model[2].requires_grad_(False)
    optimizer.param_groups.pop()
    optimizer.add_param_group({"params": list(model[0].parameters())})
    state["n"] = 2
    state["new"] = torch.ones(1)
    again, fresh = walker.walk(), walk_state(state)
    assert encode_tree(again.tree) == encode_tree(fresh.tree)
    assert [(a.name, a.fence, a.global_shape) for a in again.leaves] == [
        (a.name, a.fence, a.global_shape) for a in fresh.leaves
    ]
    assert keep(again).tensors["model.0.weight"][0, 0] == 7
    assert {leaf.name: leaf.fence for leaf in again.leaves}["model.2.weight"] is FenceClass.FROZEN
    model[0].weight.data = torch.zeros(3, 3)
    assert walker.walk().leaves[0].global_shape == (3, 3)


def test_a_walker_keeps_no_tensor_of_the_user_alive():
    model = nn.Linear(2, 2)
    state = {"model": model, "x": torch.zeros(2)}
    walker = StateWalker(state)
    walker.walk()
    ref = weakref.ref(state.pop("x"))
    gc.collect()
    assert ref() is None
    assert walker.walk().leaves


def test_fused_adamw_state_is_owned_like_any_other():
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step(model, optimizer)
    found = fences({"model": model, "optim": optimizer})
    assert found["optim.state.0.weight.step"] == "owned"


def test_a_tensor_learning_rate_is_of_the_rest_because_schedulers_write_it():
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1))
    found = fences({"model": model, "optim": optimizer})
    assert found["optim.param_groups.0.lr"] == "rest"


def test_an_optimizer_wrapper_is_seen_through():
    model = small_model()
    inner = torch.optim.SGD(model.parameters())

    class Wrapper(torch.optim.Optimizer):
        def __init__(self):
            self.optimizer = inner

    assert optimizers_in({"optim": Wrapper()}) == [inner]
    assert walk_state({"optim": Wrapper()}).tree == walk_state({"optim": inner}).tree


def test_walking_again_is_fast():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(150)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    walker = StateWalker({"model": model, "optim": optimizer})
    assert len(walker.walk().leaves) == 1200
    took = []
    for _ in range(10):
        start = time.perf_counter()
        walker.walk()
        took.append(time.perf_counter() - start)
    assert min(took) < 10e-3  # 2 ms when nothing else runs; a shared machine may be several times slower


def test_a_hundred_thousand_tensors_can_be_walked():
    state = {"many": {i: torch.zeros(1) for i in range(100_000)}}
    start = time.perf_counter()
    assert len(walk_state(state).leaves) == 100_000
    assert time.perf_counter() - start < 20
    assert save({"few": dict(list(state["many"].items())[:3])}).boxes.keys() == {"few.0", "few.1", "few.2"}
