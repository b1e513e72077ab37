"""Architectures: shapes, sizes, gradients and refusals; torchvision beside a build of torch that does not fit it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from real_data import refused
from torch import Tensor, nn

from drs.config import PROJECT_ROOT
from drs.data_cache import DATASETS
from drs.models import MODELS, Normalize, build_model, count_parameters
from drs.torchvision_compat import import_torchvision

TOO_SMALL = {("lenet", "digits"), ("vgg16_bn", "digits"), ("vgg16_bn", "mnist"), ("vgg16_bn", "fashion_mnist")}


def config(group: str, name: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(PROJECT_ROOT / "configs" / group / f"{name}.yaml").copy())


def build(name: str, data: str = "cifar10", **options: Any) -> nn.Module:
    values: dict[str, Any] = OmegaConf.to_object(OmegaConf.load(PROJECT_ROOT / "configs" / "data" / f"{data}.yaml"))  # type: ignore[assignment]
    kept = {key: values[key] for key in ("num_classes", "channels", "size", "mean", "std")}
    return build_model(name, **kept, **options)


def pixels(data: str, batch: int = 4) -> Tensor:
    spec = DATASETS[data]
    return torch.rand(batch, spec.channels, spec.size, spec.size, generator=torch.Generator().manual_seed(0))


def settle(model: nn.Module, images: Tensor) -> nn.Module:
    """Put batch normalisation's statistics where training would, and return the model in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average over all batches, of which there is one
    with torch.no_grad():
        model.train()(images)
    return model.eval()


@pytest.mark.parametrize("data", DATASETS)
@pytest.mark.parametrize("name", MODELS)
def test_configured_models_give_finite_logits(name: str, data: str) -> None:
    options = config("model", name)["options"]
    if (name, data) in TOO_SMALL:
        refused(lambda: build(name, data, **options), f"model={name}: needs images of at least", "use model=mlp")
        return
    model = build(name, data, **options)
    images = pixels(data)
    for mode in (True, False):
        logits = model.train(mode)(images)
        assert logits.shape == (4, DATASETS[data].num_classes)
        assert bool(logits.isfinite().all())


@pytest.mark.parametrize("name", MODELS)
def test_configured_options_are_the_defaults(name: str) -> None:
    values = config("model", name)
    assert values["name"] == name
    assert count_parameters(build(name, **values["options"])) == count_parameters(build(name))


@pytest.mark.parametrize(
    ("name", "data", "published"),
    [
        ("resnet18", "cifar10", 11_173_962),  # kuangliu/pytorch-cifar and most CIFAR papers
        ("vgg16_bn", "cifar10", 14_728_266),
        ("resnet9", "cifar10", 6_573_120),  # David Page's, without a bias in the classifier
        ("lenet", "mnist", 61_706),  # LeNet-5 with full connections between its maps
        ("mlp", "mnist", 784 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10),
        (
            "smallcnn",
            "cifar10",
            9 * (3 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64) + 2 * (16 + 32 * 2 + 64 * 2) + 650,
        ),
    ],
)
def test_parameter_counts(name: str, data: str, published: int) -> None:
    assert count_parameters(build(name, data)) == published


def test_count_leaves_out_what_is_not_trained() -> None:
    model = nn.Sequential(Normalize([0.5], [0.5]), nn.Linear(3, 2))
    assert count_parameters(model) == 8
    model[1].weight.requires_grad_(False)
    assert count_parameters(model) == 2


def test_widths_scale_the_models() -> None:
    assert build("mlp", width=7)[1][1].out_features == 7  # type: ignore[index,union-attr]
    assert count_parameters(build("smallcnn", width=32)) > 3.5 * count_parameters(build("smallcnn", width=16))
    assert count_parameters(build("resnet9", width=32)) < 0.3 * count_parameters(build("resnet9", width=64))


def test_cifar_stem_keeps_the_resolution() -> None:
    """ImageNet's stem would leave 1 x 1 of 32 x 32 pixels."""
    model, shapes = build("resnet18").eval(), []
    network: Any = model[1]  # type: ignore[index]
    for layer in (network.layer1, network.layer4):
        layer.register_forward_hook(lambda module, given, result: shapes.append(tuple(result.shape[2:])))
    model(pixels("cifar10"))
    assert shapes == [(32, 32), (4, 4)]


def test_vgg_features_are_torchvisions() -> None:
    torch.manual_seed(0)
    ours: Any = build("vgg16_bn")[1].eval()  # type: ignore[index]
    with torch.device("meta"):
        theirs = import_torchvision().models.vgg16_bn().features
    theirs.to_empty(device="cpu").load_state_dict(ours[0].state_dict())
    images = pixels("cifar10")
    assert torch.equal(ours[0](images), theirs.eval()(images))
    weight = ours[0][7].weight
    assert weight.std().item() == pytest.approx((2 / (9 * weight.shape[0])) ** 0.5, rel=0.02)


# What attacks and statistics rely on


def test_normalisation_by_hand() -> None:
    images = torch.tensor([[[[0.0, 1.0]], [[0.5, 0.25]]]])
    result = Normalize([0.5, 0.25], [0.5, 0.125])(images)
    assert result.tolist() == [[[[-1.0, 1.0]], [[2.0, 0.0]]]]
    model = build("mlp", "mnist")
    assert isinstance(model[0], Normalize)  # type: ignore[index]
    assert model[0](torch.full((1, 1, 1, 1), 0.1307)).item() == pytest.approx(0, abs=1e-6)  # type: ignore[index]
    assert {"0.mean", "0.std"} <= model.state_dict().keys(), "a checkpoint must carry the constants"


@pytest.mark.parametrize("name", MODELS)
def test_gradient_at_the_input_is_the_slope(name: str) -> None:
    """A difference quotient of the cross-entropy along the gradient, in float64, gives the gradient's norm."""
    torch.manual_seed(0)
    images = pixels("cifar10", 2).double()
    model = settle(build(name).double(), pixels("cifar10").double())
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(images), torch.tensor([3, 7])), images)
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())
    step = 1e-7 * gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (
            nn.functional.cross_entropy(model(moved), torch.tensor([3, 7])) for moved in (images + step, images - step)
        )
    assert ((ahead - behind) / 2e-7).item() == pytest.approx(gradient.norm().item(), rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_eval_mode_treats_each_sample_alone_and_repeats(name: str) -> None:
    """In float64, where rounding on any processor stays far below what mixing samples would do."""
    torch.manual_seed(0)
    images = pixels("cifar10", 4).double()
    model = settle(build(name).double(), images)
    with torch.no_grad():
        together, again = model(images), model(images)
        alone = torch.cat([model(images[index : index + 1]) for index in range(4)])
    assert torch.equal(together, again)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("name", MODELS)
def test_memory_format_changes_nothing(name: str) -> None:
    """In float64: float32 rounds differently in another order, by more on one processor than on another."""
    torch.manual_seed(0)
    images = pixels("cifar10", 4).double()
    model = settle(build(name).double(), images)
    with torch.no_grad():
        expected = model(images)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        found = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_the_images_given_stay_as_they_were(name: str) -> None:
    images = pixels("cifar10")
    before = images.clone()
    build(name)(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", MODELS)
def test_training_has_no_noise_of_its_own(name: str) -> None:
    model, images = build(name).train(), pixels("cifar10")
    assert torch.equal(model(images), model(images))


def test_the_seed_decides_the_weights() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([parameter.flatten() for parameter in build("smallcnn").parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


# Refusals


def test_wrong_requests_are_refused() -> None:
    refused(
        lambda: build("resnet50"), "model.name=resnet50: unknown", "mlp, lenet, smallcnn, resnet9, resnet18, vgg16_bn"
    )
    refused(lambda: build("mlp", widht=3), "model.options.widht=3: mlp has no such option", "it has width")
    refused(lambda: build("lenet", width=3), "model.options.width=3", "it has no options")
    for value in (0, -1, 1.5, "wide", None, True):
        refused(lambda: build("smallcnn", width=value), f"model.options.width={value}: must be a whole number")  # noqa: B023
    for value in (0, -0.5, float("nan"), float("inf"), "big"):
        refused(lambda: build("resnet9", logit_scale=value), "model.options.logit_scale=", "a number above 0")  # noqa: B023
    small = {"num_classes": 10, "channels": 1, "mean": [0.5], "std": [0.5]}
    for name, size in (("lenet", 11), ("smallcnn", 7), ("resnet9", 7), ("vgg16_bn", 31)):
        refused(lambda: build_model(name, size=size, **small), f"model={name}", f"data.size={size}")  # noqa: B023
        build_model(name, size=size + 1, **small).eval()(torch.rand(1, 1, size + 1, size + 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mean", "std", "channels"),
    [
        ([0.5], [0.0], 1),
        ([0.5], [-1.0], 1),
        ([0.5, 0.5], [0.5], 2),
        ([float("nan")], [0.5], 1),
        ([0.5] * 3, [0.5] * 3, 1),
    ],
)
def test_wrong_normalisation_is_refused(mean: list[float], std: list[float], channels: int) -> None:
    refused(lambda: build_model("mlp", num_classes=2, channels=channels, size=8, mean=mean, std=std), "data.mean=")


# torchvision


def run_python(code: str, *path: Path) -> str:
    setting = f"import sys; sys.path[:0] = {[str(folder) for folder in (*path, PROJECT_ROOT)]}\n"
    done = subprocess.run([sys.executable, "-c", setting + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchvision_loads_here() -> None:
    """Whether torchvision fits this torch or not: data sets and models work, and it is one module for everybody."""
    found = run_python(
        "from drs.torchvision_compat import import_torchvision\n"
        "first = import_torchvision()\n"
        "import torchvision, torch\n"
        "print(first is torchvision is import_torchvision(), torchvision.datasets.MNIST.__name__)\n"
        "print(tuple(torchvision.models.resnet18().eval()(torch.rand(1, 3, 64, 64)).shape))\n"
    )
    assert found.splitlines() == ["True MNIST", "(1, 1000)"]


@pytest.mark.parametrize("error", [None, "RuntimeError('something else')"])
def test_shim_does_nothing_where_it_has_no_cause(tmp_path: Path, error: str | None) -> None:
    """A torchvision that loads by itself gets no operators; one that fails for another reason keeps its error."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise {error}\n" if error else "")
    for module in ("datasets", "models"):
        (package / f"{module}.py").write_text("")
    found = run_python(
        "import torch\n"
        "from drs.torchvision_compat import import_torchvision\n"
        "try:\n"
        "    print(import_torchvision().__name__)\n"
        "except RuntimeError as caught:\n"
        "    print(caught)\n"
        "print(any(s.startswith('torchvision::') for s in torch._C._dispatch_get_all_op_names()))\n",
        tmp_path,
    )
    assert found.splitlines() == ["something else" if error else "torchvision", "False"]


@pytest.mark.parametrize(("name", "data"), [("lenet", "mnist"), ("smallcnn", "cifar10"), ("resnet9", "cifar10")])
def test_pooling_before_the_cut_at_zero_changes_no_bit(name: str, data: str) -> None:
    options = {} if name == "lenet" else {"width": 4}
    images = pixels(data, 8).contiguous(memory_format=torch.channels_last)
    found = []
    for swap in (False, True):
        torch.manual_seed(0)
        model = build(name, data, **options).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        swapped = 0
        for chain in [module for module in model.modules() if isinstance(module, nn.Sequential)] if swap else []:
            for i in range(len(chain) - 1):
                if isinstance(chain[i], nn.MaxPool2d) and isinstance(chain[i + 1], nn.ReLU):
                    chain[i], chain[i + 1] = chain[i + 1], chain[i]
                    swapped += 1
        leaf = images.clone().requires_grad_()
        logits = model(leaf)
        logits.square().sum().backward()
        found.append([logits, leaf.grad, *(parameter.grad for parameter in model.parameters())])
        assert bool(swapped) == swap, "nothing was there to swap"
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
