"""ConvMixer against timm: keys, initialisation, logits, methods, arguments; the table of variants."""

import copy
import re
from typing import Any

import pytest
import torch
from plain_models import check_against, needs_kernels, timms, trained
from torch import nn

import cmx_kernels
from cmx_kernels import ConvMixer, create_model, list_models
from cmx_kernels.models import variants

timm = pytest.importorskip("timm")
timm_optim = pytest.importorskip("timm.optim")
RELEASED = ["convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14"]
# Width, kernel, patch, activation of the released three; two blocks are enough to tell a wrong one
SMALL = [(1536, 9, 7, nn.GELU), (768, 7, 7, nn.ReLU), (1024, 9, 14, nn.GELU)]


def pair(**kw: Any) -> tuple[ConvMixer, nn.Module]:
    """Ours, fused, and timm's, with equal weights."""
    args = {"kernel_size": 5, "patch_size": 7, "num_classes": 10, **kw}
    torch.manual_seed(0)
    ours = ConvMixer(32, 3, **args)
    torch.manual_seed(0)
    theirs = timm.models.convmixer.ConvMixer(32, 3, **args)
    return trained(ours), trained(theirs)


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_timms_keys(name: str) -> None:
    ours, theirs = create_model(name, device="meta"), timm.create_model(name, device="meta")
    for own, other in ((ours.state_dict(), theirs.state_dict()),):
        assert [(k, v.shape, v.dtype) for k, v in own.items()] == [(k, v.shape, v.dtype) for k, v in other.items()]
    depth = len(theirs.blocks)
    assert len(ours.state_dict()) == 9 + 14 * depth
    assert [type(m) for m in (ours.stem[1], ours.blocks[0][2])] == [
        type(m) for m in (theirs.stem[1], theirs.blocks[0][2])
    ]


@pytest.mark.parametrize(("dim", "kernel", "patch", "act"), SMALL)
@torch.no_grad()
def test_released_widths_match_timm(dim: int, kernel: int, patch: int, act: type[nn.Module]) -> None:
    torch.manual_seed(0)
    theirs = timms(dim, 2, kernel, patch, act_layer=act)
    torch.manual_seed(0)
    ours = ConvMixer(dim, 2, kernel, patch, act_layer=act)
    torch.manual_seed(0)
    plain = ConvMixer(dim, 2, kernel, patch, act_layer=act, fused=False)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), f"{key}: one seed, other weights"
    for model in (theirs, ours, plain):
        trained(model)
    x = torch.randn(1, 3, 6 * patch + 3, 5 * patch)
    assert torch.equal(plain(x), theirs(x))
    check_against(ours(x), theirs, x)


def test_parameter_counts_are_the_published_ones() -> None:
    published = {
        "convmixer_1536_20": 51_625_960,
        "convmixer_1536_20_ks3_p7": 49_414_120,
        "convmixer_1536_20_ks9_p14": 52_303_336,
        "convmixer_1536_24_ks9_p14": 62_275_048,
        "convmixer_768_32": 21_110_248,
        "convmixer_768_32_ks3_p14": 20_465_896,
        "convmixer_1024_20_ks9_p14": 24_383_464,
        "convmixer_1024_16_ks9_p7": 19_381_224,
        "convmixer_1024_12_ks8_p7": 14_621_672,
        "convmixer_512_16_ks8_p7": 5_357_544,
        "convmixer_512_12_ks8_p7": 4_165_608,
        "convmixer_256_8_ks5_p2": 594_186,
        "convmixer_256_8_ks9_p1": 706_570,
    }
    counts = {name: sum(p.numel() for p in create_model(name, device="meta").parameters()) for name in list_models()}
    assert counts == published
    relu = {name for name in list_models() if type(create_model(name, device="meta").stem[1]) is nn.ReLU}
    assert relu == {"convmixer_768_32", "convmixer_768_32_ks3_p14"}


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("512/16", "convmixer_512_16_ks8_p7"),
        ("ConvMixer-1536/20", "convmixer_1536_20"),
        ("convmixer_768_32.in1k", "convmixer_768_32"),
        ("hf-hub:timm/convmixer_768_32.in1k", "convmixer_768_32"),
        ("1024/20", "convmixer_1024_20_ks9_p14"),
        ("convmixer_1536_20_ks9_p7", "convmixer_1536_20"),
        ("768_32_p14", "convmixer_768_32_ks3_p14"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert variants.find_variant(alias).name == name


@pytest.mark.parametrize(
    ("name", "says"),
    [("256/8", "any of"), ("1536_21", "convmixer_1536_20"), ("resnet50", "no published"), ("512", "no pub")],
)
def test_unknown_names(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        create_model(name)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", "fast", "fastmax", "fastcatavgmax"])
@pytest.mark.parametrize("classes", [0, 10])
@torch.no_grad()
def test_pools_and_heads(pool: str, classes: int) -> None:
    ours, theirs = pair(global_pool=pool, num_classes=classes)
    x = torch.randn(2, 3, 30, 42)
    check_against(ours(x), theirs, x)
    assert ours.head_hidden_size == theirs.head_hidden_size
    assert ours.global_pool.feat_mult() == theirs.global_pool.feat_mult()
    features = theirs.forward_features(x)
    for pre_logits in (False, True):
        torch.testing.assert_close(ours.forward_head(features, pre_logits), theirs.forward_head(features, pre_logits))


@torch.no_grad()
def test_methods_do_what_timms_do() -> None:
    ours, theirs = pair()
    x = torch.randn(2, 3, 28, 28)
    check_against(ours.forward_features(x), nn.Sequential(theirs.stem, theirs.blocks), x)
    assert ours.feature_info == theirs.feature_info
    assert ours.group_matcher() == theirs.group_matcher()
    assert (ours.num_features, ours.num_classes, ours.in_chans) == (
        theirs.num_features,
        theirs.num_classes,
        theirs.in_chans,
    )
    assert ours.get_classifier() is ours.head
    for kw in ({}, {"indices": 2}, {"indices": [0, -1]}, {"indices": [1], "stop_early": True}):
        last, some = ours.forward_intermediates(x, **kw)
        last_too, wanted = theirs.forward_intermediates(x, **kw)
        assert len(some) == len(wanted)
        torch.testing.assert_close([last, *some], [last_too, *wanted])
    assert len(ours.forward_intermediates(x, indices=1, intermediates_only=True)) == 1
    for indices in (4, 0, [3], [-4]):
        with pytest.raises(ValueError, match="indices"):
            ours.forward_intermediates(x, indices=indices)
    with pytest.raises(ValueError, match="NHWC"):
        ours.forward_intermediates(x, output_fmt="NHWC")


@torch.no_grad()
def test_timms_tools_take_our_model() -> None:
    x = torch.randn(1, 3, 28, 28)
    ours, theirs = pair()
    simpler = timm.utils.reparameterize_model(ours)
    check_against(simpler(x), theirs, x)
    from timm.models._features import FeatureGetterNet

    got, wanted = (FeatureGetterNet(copy.deepcopy(model), out_indices=(0, 1)) for model in (ours, theirs))
    assert got.feature_info.channels() == wanted.feature_info.channels()
    assert len(got.model.blocks) == 2
    torch.testing.assert_close(got(x), wanted(x))
    groups = timm_optim.param_groups_layer_decay(ours, layer_decay=0.5)
    assert len(groups) == len(timm_optim.param_groups_layer_decay(theirs, layer_decay=0.5))


@torch.no_grad()
def test_reset_classifier() -> None:
    ours, theirs = pair()
    x = torch.randn(1, 3, 28, 28)
    for classes, pool in ((7, None), (5, "catavgmax"), (0, None), (0, ""), (4, "avg")):
        for model in (ours, theirs):
            model.reset_classifier(classes, pool)
        theirs.load_state_dict(ours.state_dict())
        assert ours.head_hidden_size == theirs.head_hidden_size
        check_against(ours(x), theirs, x)
    ours.half().train().reset_classifier(3)
    assert ours.head.weight.dtype == torch.float16
    ours.reset_classifier(0, "")
    with pytest.raises(ValueError, match="global_pool"):  # timm: a shape error, or silently wrong if W == dim
        ours.reset_classifier(10)


def test_checkpointing_changes_nothing_but_memory() -> None:
    """timm updates the running statistics of checkpointed blocks twice a step."""
    plain, _ = pair()
    twice = copy.deepcopy(plain)
    twice.set_grad_checkpointing()
    x = torch.randn(4, 3, 28, 28)
    for model in (plain, twice):
        model.train()
        model(x).square().mean().backward()
    assert twice.blocks[0][3].num_batches_tracked == 1
    for (key, a), b in zip(plain.state_dict().items(), twice.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, msg=key)
    for a, b in zip(plain.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)
    twice.eval()
    with torch.no_grad():
        torch.testing.assert_close(twice(x), plain.eval()(x))


@pytest.mark.parametrize(
    ("kernel", "patch", "size"),
    [(8, 7, (28, 35)), ((3, 6), (2, 4), (9, 21)), (1, 1, (5, 5)), (2, 3, (10, 8)), (31, 4, (17, 40))],
)
@torch.no_grad()
def test_even_and_rectangular_kernels(kernel: Any, patch: Any, size: tuple[int, int]) -> None:
    ours = trained(ConvMixer(24, 2, kernel, patch, 5, in_chans=2))
    plain = ConvMixer(24, 2, kernel, patch, 5, in_chans=2, fused=False).eval()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 2, *size)
    check_against(ours(x), plain, x)


@pytest.mark.parametrize(
    ("kw", "error", "says"),
    [
        ({"dim": 0}, ValueError, "dim: got 0"),
        ({"depth": -1}, ValueError, "depth: got -1"),
        ({"dim": 8.0}, TypeError, "dim: got 8.0"),
        ({"kernel_size": 32}, ValueError, "kernel_size: got 32"),
        ({"kernel_size": (3, 0)}, ValueError, "kernel_size: got 0"),
        ({"kernel_size": "3"}, TypeError, "kernel_size: got '3'"),
        ({"patch_size": 0}, ValueError, "patch_size: got 0"),
        ({"patch_size": (1, 2, 3)}, TypeError, "patch_size"),
        ({"n_classes": -1}, ValueError, "num_classes: got -1"),
        ({"n_classes": 5, "num_classes": 6}, ValueError, "num_classes: got 6 and n_classes=5"),
        ({"global_pool": "fastest"}, ValueError, "global_pool: got 'fastest'"),
        ({"global_pool": ""}, ValueError, "num_classes=0"),
        ({"drop_rate": 2}, ValueError, "drop_rate"),
        ({"drop_rate": "2"}, ValueError, "drop_rate: got '2'"),
        ({"act_layer": "gelu"}, TypeError, "act_layer: got 'gelu', wanted a class"),
        ({"act_layer": nn.GELU()}, TypeError, "act_layer: got GELU(approximate='none'), wanted a class"),
        ({"in_chans": 0}, ValueError, "in_chans"),
    ],
)
def test_argument_errors(kw: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        ConvMixer(**{"dim": 8, "depth": 1, **kw})


def test_classes_have_two_names() -> None:
    assert ConvMixer(8, 1, 3, 2, 5).num_classes == 5
    assert ConvMixer(8, 1, num_classes=6).num_classes == 6
    assert ConvMixer(8, 1, n_classes=6, num_classes=6).head.out_features == 6
    assert create_model("256/8_p1", num_classes=100, device="meta").head.out_features == 100
    assert create_model("256/8_p1", device="meta").head.out_features == 10


@needs_kernels
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_images_that_do_not_fit_are_named(grad: bool, train: bool) -> None:
    """Before a batch is counted."""
    ours = pair()[0].train(train)
    before = copy.deepcopy(ours.state_dict())
    with torch.set_grad_enabled(grad):
        for x, error, says in (
            (torch.randn(3, 28, 28), ValueError, "batch dimension"),
            (torch.randn(1, 4, 28, 28), ValueError, "weight: got shape"),
            (torch.randn(1, 3, 6, 28), ValueError, "6x28 pixels"),
            (torch.randint(0, 255, (1, 3, 28, 28), dtype=torch.uint8), TypeError, "uint8"),
            (torch.randn(1, 3, 28, 28).bfloat16(), TypeError, "bfloat16"),
            (torch.randn(1, 3, 28, 28).double(), TypeError, "float64"),
            (torch.randn(1, 3, 28, 28, device="meta"), ValueError, "weight: got device cpu with x on meta"),
            (torch.randn(1, 3, 28, 28).to_sparse(), TypeError, "x: got layout torch.sparse_coo"),
            (torch.nested.nested_tensor([torch.randn(3, 28, 28)]), TypeError, "x: got a nested tensor"),
        ):
            with pytest.raises(error, match=says):
                ours(x)
        torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)
        assert ours.eval()(torch.randn(0, 3, 28, 28)).shape == (0, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_device_and_dtype_arguments(dtype: torch.dtype) -> None:
    model = ConvMixer(16, 1, 3, 2, 4, device="meta", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert cmx_kernels.ConvMixer(8, 1, 3, 2, 4, fused=False).__class__ is ConvMixer
