"""The registry, the options, timm's habits and the refusals of the models."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inception_fast.models import DataConfig, FeatureNet, GoogLeNetOutputs, InceptionOutputs, create_model, list_models
from inception_fast.models.blocks import BasicConv2d, SameMaxPool2d, SamePad2d, same_padding

ALL = [
    "inception_resnet_v1",
    "inception_resnet_v2",
    "inception_v1",
    "inception_v2",
    "inception_v3",
    "inception_v4",
]


@pytest.fixture(autouse=True)
def quiet() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def meta(name: str, **options: object) -> nn.Module:
    """A net without memory: shapes, names and options cost nothing."""
    with torch.device("meta"):
        return create_model(name, **options)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_list_models() -> None:
    assert list_models() == ALL
    assert list_models("*resnet*") == ["inception_resnet_v1", "inception_resnet_v2"]
    assert list_models(["*_v3", "*_v4"]) == ["inception_v3", "inception_v4"]
    assert list_models("vgg*") == []


@pytest.mark.parametrize("name", ALL)
def test_construction_takes_under_a_second(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # an aid of the tests, not ours

    def seconds() -> float:
        start = time.process_time()  # of this process alone: what else the machine does does not count
        create_model(name)
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 1.0


def test_every_parameter_is_drawn_from_torchs_generator() -> None:
    first, second = (create_model("inception_v1", aux_logits=True).state_dict() for _ in range(2))
    torch.manual_seed(0)
    again = create_model("inception_v1", aux_logits=True).state_dict()
    for key, value in first.items():
        assert torch.equal(value, again[key]), key
        drawn = key.endswith(("conv.weight", "fc.weight", "fc1.weight", "fc2.weight"))
        assert drawn != torch.equal(value, second[key]) or key.endswith("bias"), key
    weight = first["inception4a.branch2.1.conv.weight"]
    assert weight.std().item() == pytest.approx((2 / (96 * 9)) ** 0.5, rel=0.01)
    assert abs(weight.mean().item()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_and_device_are_respected(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        net = create_model("inception_v1", num_classes=3)
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert {p.device.type for p in meta("inception_v1").parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "close"),
    [("inception_v33", "inception_v3"), ("Inception_V4", "inception_v4"), ("inceptionresnetv2", "resnet")],
)
def test_unknown_name_suggests_close_ones(name: str, close: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*did you mean .*{close}.*allowed: .*inception_resnet_v1"):
        create_model(name)


@pytest.mark.parametrize(
    ("name", "options", "error", "seen"),
    [
        ("vgg16", {}, ValueError, "vgg16"),
        ("inception_v3", {"num_classes": -1}, ValueError, "num_classes=-1"),
        ("inception_v3", {"num_classes": 2.5}, ValueError, "num_classes=2.5"),
        ("inception_v3", {"in_chans": 0}, ValueError, "in_chans=0"),
        ("inception_v3", {"convention": "caffe"}, ValueError, "convention='caffe'.*'tf', 'torch'"),
        ("inception_v3", {"drop_rate": 1.0}, ValueError, "drop_rate=1.0"),
        ("inception_v3", {"drop_rate": "a"}, ValueError, "drop_rate='a'; allowed: 0"),
        ("inception_v3", {"bn_eps": "a"}, ValueError, "bn_eps='a'; allowed: bn_eps > 0"),
        ("inception_v4", {"bn_momentum": None}, ValueError, "bn_momentum=None; allowed: 0"),
        ("inception_v1", {"conv_block": "a"}, ValueError, "conv_block='a'; allowed: what makes"),
        ("inception_v3", {"fid": "yes"}, ValueError, "fid='yes'; allowed: False, True"),
        ("inception_v3", {"features_only": "no"}, ValueError, "features_only='no'; allowed: False, True"),
        ("inception_v3", {"bn_eps": 0.0}, ValueError, "bn_eps=0.0"),
        ("inception_v3", {"bn_eps": float("inf")}, ValueError, "bn_eps=inf; allowed: bn_eps > 0, finite"),
        ("inception_v3", {"bn_momentum": 2}, ValueError, "bn_momentum=2"),
        ("inception_v3", {"global_pool": "sum"}, ValueError, "global_pool='sum'"),
        ("inception_v3", {"global_pool": ""}, ValueError, "num_classes=0"),
        ("inception_v3", {"widths": "paper"}, TypeError, "inception_v3 has no option widths.*fid"),
        ("inception_v3", {"fid": True, "aux_logits": True}, ValueError, "aux_logits=True with fid=True"),
        ("inception_v3", {"fid": True, "convention": "torch"}, ValueError, "convention='torch' with fid=True"),
        ("inception_v3", {"transform_input": True, "in_chans": 1}, ValueError, "in_chans=1.*in_chans=3"),
        ("inception_v1", {"classic": True, "conv_block": BasicConv2d}, ValueError, "conv_block with classic=True"),
        ("inception_v1", {"aux_drop_rate": -0.1}, ValueError, "aux_drop_rate=-0.1"),
        ("inception_v1", {"aux_drop_rate": "a"}, ValueError, "aux_drop_rate='a'; allowed: 0"),
        ("inception_v1", {"classic": "False"}, ValueError, "classic='False'; allowed: False, True"),
        ("inception_v1", {"transform_input": "no"}, ValueError, "transform_input='no'; allowed: False, True"),
        ("inception_v3", {"transform_input": "no"}, ValueError, "transform_input='no'; allowed: False, True"),
        ("inception_v2", {"stem": "deep"}, ValueError, "stem='deep'.*'separable', 'plain'"),
        ("inception_v2", {"aux_logits": True}, ValueError, "aux_logits=True for inception_v2"),
        ("inception_resnet_v1", {"aux_logits": True}, ValueError, "aux_logits=True for inception_resnet_v1"),
        ("inception_resnet_v1", {"widths": "wide"}, ValueError, "widths='wide'.*'slim', 'paper'"),
        ("inception_resnet_v1", {"widths": "paper", "embedding_size": 128}, ValueError, "embedding_size=128"),
        ("inception_resnet_v1", {"embedding_size": 0}, ValueError, "embedding_size=0"),
        ("inception_resnet_v1", {"num_classes": 0, "global_pool": ""}, ValueError, "global_pool"),
        ("inception_v1", {"out_indices": (0,)}, ValueError, "features_only=True"),
        ("inception_v1", {"features_only": True, "aux_logits": True}, ValueError, "features_only"),
        ("inception_v1", {"features_only": True, "out_indices": (5,)}, ValueError, "-5 to 4"),
        ("inception_v1", {"features_only": True, "out_indices": ()}, ValueError, "at least one"),
        ("inception_v1", {"features_only": True, "out_indices": 2}, ValueError, "out_indices=2 of inception_v1"),
        ("inception_v1", {"features_only": True, "out_indices": (3, 1)}, ValueError, "rising order"),
    ],
    ids=str,
)
def test_impossible_options(name: str, options: dict[str, object], error: type[Exception], seen: str) -> None:
    with pytest.raises(error, match=seen) as caught:
        meta(name, **options)
    assert "allowed" in str(caught.value)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("features_only", [False, True])
def test_impossible_input(name: str, features_only: bool) -> None:
    net = meta(name, features_only=features_only).eval()
    least = 15 if name in ("inception_v1", "inception_v2") else 75

    def refused(error: type[Exception], seen: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        with pytest.raises(error, match=rf"{name} got .*{seen}.*allowed"):
            net(torch.empty(*shape, dtype=dtype, device="meta"))

    refused(ValueError, r"\(3, 99, 99\)", 3, 99, 99)
    refused(ValueError, "4 channels", 1, 4, 99, 99)
    refused(ValueError, "99 channels", 1, 99, 99, 3)
    refused(TypeError, "torch.uint8", 1, 3, 99, 99, dtype=torch.uint8)
    refused(TypeError, "torch.float64", 1, 3, 99, 99, dtype=torch.float64)
    refused(ValueError, "empty batch", 0, 3, 99, 99)
    refused(ValueError, f"{least - 1}x99", 1, 3, least - 1, 99)
    refused(ValueError, f"99x{least - 1}", 1, 3, 99, least - 1)
    for value in (None, [[0.0]]):
        with pytest.raises(TypeError, match=rf"{name} got (NoneType|list); allowed: a torch\.Tensor"):
            net(value)
    net(torch.empty(1, 3, least, least, device="meta"))
    wide = net.double()
    wide(torch.empty(1, 3, 99, 99, dtype=torch.float64, device="meta"))


@pytest.mark.parametrize("name", ALL)
def test_impossible_map(name: str) -> None:
    net = meta(name, num_classes=3).eval()
    channels = net.num_features
    for shape in ((channels, 3, 3), (2, channels + 1, 3, 3), (0, channels, 3, 3), (1, channels, 0, 3)):
        with pytest.raises(ValueError, match=rf"{name}'s head got .*; allowed: \[n, {channels}, h, w\]"):
            net.forward_head(torch.empty(shape, device="meta"))
    with pytest.raises(TypeError, match="head got NoneType"):
        net.forward_head(None)
    assert net.forward_head(torch.empty(2, channels, 1, 3, device="meta")).shape == (2, 3)


def test_autocast_takes_what_it_casts() -> None:
    net = create_model("inception_v1", num_classes=2).eval()
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert net(torch.zeros(1, 3, 32, 32, dtype=dtype)).shape == (1, 2)
    with pytest.raises(ValueError, match=r"layout torch\.sparse_coo; allowed: torch\.strided"):
        net(torch.zeros(1, 3, 32, 32).to_sparse())


@pytest.mark.parametrize("name", ["inception_v1", "inception_v3", "inception_v4", "inception_resnet_v2"])
def test_auxiliary_heads_run_in_training_only(name: str) -> None:
    net = meta(name, aux_logits=True, num_classes=7)
    x = torch.empty(2, 3, 299, 299, device="meta")
    kind = GoogLeNetOutputs if name == "inception_v1" else InceptionOutputs
    out = net.train()(x)
    assert type(out) is kind and {y.shape for y in out} == {(2, 7)}
    assert type(net.eval()(x)) is Tensor
    assert type(meta(name).train()(x)) is Tensor
    net.reset_classifier(5)
    assert {y.shape for y in net.train()(x)} == {(2, 5)}


def test_auxiliary_head_names_the_smallest_image() -> None:
    net = meta("inception_v3", aux_logits=True).train()
    with pytest.raises(ValueError, match=r"16x16 map; allowed: 17x17.*299x299"):
        net(torch.empty(2, 3, 298, 298, device="meta"))


def test_order_of_the_auxiliary_logits_of_v1() -> None:
    net = create_model("inception_v1", aux_logits=True, num_classes=2, drop_rate=0.0, aux_drop_rate=0.0)
    with torch.no_grad():
        for fill, head in ((1.0, net.aux1.fc2), (2.0, net.aux2.fc2), (3.0, net.fc)):
            head.weight.zero_()
            head.bias.fill_(fill)
        out = net(torch.randn(2, 3, 64, 64))
    assert [y[0, 0].item() for y in (out.logits, out.aux_logits2, out.aux_logits1)] == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("name", ALL)
def test_timm_habits(name: str) -> None:
    net = create_model(name, num_classes=4).eval()
    x = torch.randn(2, 3, 75, 75)
    with torch.no_grad():
        y, f = net(x), net.forward_features(x)
        assert type(y) is Tensor and torch.equal(net.forward_head(f), y)
        assert 1e-3 < y.std().item() < 1e3, "random parameters must neither kill nor blow up the activations"
        assert f.shape[:2] == (2, net.num_features)
        f = torch.randn(2, net.num_features, 2, 3)
        pre = net.forward_head(f, pre_logits=True)
        assert pre.shape == (2, net.head_hidden_size)
        assert torch.equal(net.get_classifier()(pre), net.forward_head(f))
        net.reset_classifier(9)
        assert net.num_classes == net.get_classifier().out_features == 9 and net.forward_head(f).shape == (2, 9)
        net.reset_classifier(0)
        assert torch.equal(net.forward_head(f), F.normalize(pre) if name == "inception_resnet_v1" else pre)
        net.reset_classifier(3, global_pool="max")
        assert not torch.equal(net.forward_head(f, pre_logits=True), pre)
    assert net.forward_head(f).requires_grad


def test_reset_classifier_keeps_dtype_and_mode_and_refuses_nonsense() -> None:
    net = create_model("inception_v1", num_classes=0).eval().to(torch.bfloat16)
    net.reset_classifier(6)
    assert net.fc.weight.dtype == torch.bfloat16 and not net.fc.training
    assert net.options.num_classes == 6
    with pytest.raises(ValueError, match="num_classes=-2"):
        net.reset_classifier(-2)
    with pytest.raises(ValueError, match="global_pool='mean'"):
        net.reset_classifier(2, global_pool="mean")
    net.reset_classifier(0, global_pool="")
    assert net(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)).shape == (1, 1024, 2, 2)


@pytest.mark.parametrize("name", ALL)
def test_features_only(name: str) -> None:
    x = torch.empty(1, 3, 160, 160, device="meta")
    whole = meta(name)
    net = meta(name, features_only=True).eval()
    assert net.feature_info == whole.feature_info and net.data_config == whole.data_config
    maps = net(x)
    assert [y.shape[1] for y in maps] == net.feature_info.channels()
    assert net.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert all(160 // r - 4 <= y.shape[2] <= 160 // r for y, r in zip(maps, net.feature_info.reduction(), strict=True))
    assert set(net.state_dict()) < set(whole.state_dict())
    some = meta(name, features_only=True, out_indices=(1, -1)).eval()
    assert [y.shape for y in some(x)] == [maps[1].shape, maps[4].shape] and some.out_indices == (1, 4)


def test_features_are_the_maps_of_the_whole_net() -> None:
    net = create_model("inception_v1", transform_input=True).eval()
    features = FeatureNet(net, net.feature_info, (0, 3)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ends = net.forward_endpoints(x)
        first, fourth = features(x)
    assert torch.equal(first, ends["Conv2d_1a_7x7"]) and torch.equal(fourth, ends["Mixed_4f"])
    assert not any(key.startswith("inception5") for key in features.state_dict())


@pytest.mark.parametrize("name", ALL)
def test_data_config(name: str) -> None:
    config = create_model(name).data_config if name == "inception_v1" else meta(name).data_config
    size = {"inception_v1": 224, "inception_v2": 224, "inception_resnet_v1": 160}.get(name, 299)
    assert isinstance(config, DataConfig) and config.input_size == (3, size, size)
    assert config.mean == (0.5, 0.5, 0.5)
    assert config.std == ((128 / 255,) * 3 if name == "inception_resnet_v1" else (0.5, 0.5, 0.5))
    assert config.crop_pct == {"inception_resnet_v2": 0.8975, "inception_resnet_v1": 1.0}.get(name, 0.875)
    with pytest.raises(AttributeError):
        config.mean = (0.0,)  # type: ignore[misc]
    grey = meta(name, in_chans=1).data_config
    assert grey.input_size == (1, size, size) and len(grey.mean) == len(grey.std) == 1


@pytest.mark.parametrize(("name", "channels"), [*((name, 1) for name in ALL), ("inception_v2", 5)])
def test_other_image_channels(name: str, channels: int) -> None:
    x = torch.empty(2, channels, 79, 79, device="meta")
    assert meta(name, in_chans=channels).eval()(x).shape == (2, 1000)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_adapted_first_convolution_keeps_the_response_to_grey(channels: int) -> None:
    net = create_model("inception_v3", num_classes=5).eval()
    grey = torch.randn(1, 1, 75, 75)
    with torch.no_grad():
        before = net.Conv2d_1a_3x3.conv(grey.expand(-1, 3, -1, -1))
        rest = net.Conv2d_1a_3x3.conv.weight[:, :channels].clone()
        net.adapt_in_chans(channels)
        after = net.Conv2d_1a_3x3.conv(grey.expand(-1, channels, -1, -1))
        assert net(grey.expand(1, channels, -1, -1)).shape == (1, 5)
    if channels == 4:  # the fourth repeats the first, so grey is weighted otherwise: timm's rule
        assert torch.equal(net.Conv2d_1a_3x3.conv.weight[:, :3], rest * 0.75)
    else:
        assert relative(after, before) < 1e-6
    assert net.in_chans == channels == net.data_config.input_size[0]


def test_first_layers_that_cannot_be_adapted() -> None:
    with pytest.raises(ValueError, match="transform_input"):
        meta("inception_v3", transform_input=True).adapt_in_chans(1)
    with pytest.raises(ValueError, match="SeparableStem"):
        meta("inception_v2").adapt_in_chans(1)
    net = meta("inception_v2", stem="plain")
    net.adapt_in_chans(1)
    assert net.Conv2d_1a_7x7.conv.in_channels == 1


@pytest.mark.parametrize("size", [*range(5, 13), 224])
@pytest.mark.parametrize("kernel", [2, 3, 7])
def test_same_padding_against_its_definition(size: int, kernel: int) -> None:
    before, after = same_padding(size, kernel, 2)
    assert after - before in (0, 1)
    assert (size + before + after - kernel) // 2 + 1 == -(-size // 2)
    x = torch.randn(1, 2, size, size + 1)
    right = same_padding(size + 1, kernel, 2)
    assert torch.equal(SamePad2d(kernel, 2)(x), F.pad(x, (*right, before, after)))
    padded = F.pad(x, (*right, before, after), value=-torch.inf)
    assert torch.equal(SameMaxPool2d(kernel, 2)(x), F.max_pool2d(padded, kernel, 2))


def test_the_known_paddings_of_the_stems() -> None:
    assert same_padding(224, 7, 2) == (2, 3)
    assert same_padding(28, 3, 2) == (0, 1)
    assert same_padding(7, 3, 2) == (1, 1)


@pytest.mark.parametrize(("name", "size"), [("inception_v1", 64), ("inception_v2", 64), ("inception_v3", 75)])
def test_conventions_share_names_and_differ_in_numbers(name: str, size: int) -> None:
    tf, torch_ = (create_model(name, convention=c, num_classes=9).eval() for c in ("tf", "torch"))
    assert list(tf.state_dict()) == list(torch_.state_dict())
    torch_.load_state_dict(tf.state_dict(), strict=True)
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert relative(tf(x), torch_(x)) > 1e-3


@pytest.mark.parametrize("name", ["inception_v4", "inception_resnet_v2"])
def test_conventions_that_are_the_same_net(name: str) -> None:
    pools = [m for c in ("tf", "torch") for m in meta(name, convention=c).modules() if isinstance(m, nn.AvgPool2d)]
    assert pools and not any(pool.count_include_pad for pool in pools)


def test_habit_of_each_family() -> None:
    habits = {name: meta(name).convention for name in ALL}
    assert habits == dict.fromkeys(ALL, "tf") | {"inception_v1": "torch", "inception_v3": "torch"}
    rates = {name: meta(name).drop_rate for name in ALL}
    assert rates == dict.fromkeys(ALL, 0.2) | {"inception_v3": 0.5, "inception_resnet_v1": 0.6}
    norms = [m for name in ALL for m in meta(name).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.1)}
    norms = [m for m in meta("inception_v4", bn_eps=1e-5, bn_momentum=3e-4).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-5, 3e-4)}


def test_classic_v1_is_the_network_of_2014() -> None:
    net = meta("inception_v1", classic=True, aux_logits=True)
    kinds = [type(m).__name__ for m in net.modules()]
    assert kinds.count("LocalResponseNorm") == 2 and "BatchNorm2d" not in kinds
    assert net.inception4a.branch3[1].conv.kernel_size == (5, 5)
    assert net.maxpool4.kernel_size == 3 and net.drop_rate == 0.4
    assert all(m.bias is not None for m in net.modules() if isinstance(m, nn.Conv2d))
    paths = [path for _, path in net.steps]
    assert paths.index("norm1") == paths.index("maxpool1") + 1 and paths.index("norm2") == paths.index("conv3") + 1
    modern = set(meta("inception_v1").state_dict())
    assert {k for k in meta("inception_v1", classic=True).state_dict() if k.endswith("weight")} <= modern


def test_classic_auxiliary_head_averages_five_by_five() -> None:
    head = create_model("inception_v1", classic=True, aux_logits=True, num_classes=2, aux_drop_rate=0.0).aux1
    x = torch.randn(2, 512, 14, 14)
    with torch.no_grad():
        y = F.relu(F.conv2d(F.avg_pool2d(x, 5, 3), head.conv.conv.weight, head.conv.conv.bias))
        y = head.fc2(F.relu(head.fc1(y.flatten(1))))
        assert relative(head(x), y) < 1e-5
        assert head(torch.randn(2, 512, 4, 4)).shape == (2, 2)


def test_local_response_norm_is_caffes() -> None:
    norm = create_model("inception_v1", classic=True).norm1
    x = torch.randn(1, 8, 2, 2, dtype=torch.float64) * 50
    total = F.pad(x.square(), (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1).sum(-1)
    assert relative(norm(x), x / (1 + 1e-4 / 5 * total) ** 0.75) < 1e-12


def test_fid_net_pools_by_maximum_in_its_last_block_only() -> None:
    net = meta("inception_v3", fid=True)
    assert net.num_classes == 1008 and net.convention == "tf" and net.fc.out_features == 1008
    assert isinstance(net.Mixed_7c.pool, nn.MaxPool2d) and isinstance(net.Mixed_7b.pool, nn.AvgPool2d)
    assert not net.Mixed_7b.pool.count_include_pad
    assert meta("inception_v3", fid=True, num_classes=0).num_classes == 0


def test_last_block_of_v2_pools_by_maximum() -> None:
    net = meta("inception_v2")
    assert isinstance(net.Mixed_5c.branch3[0], nn.MaxPool2d) and isinstance(net.Mixed_5b.branch3[0], nn.AvgPool2d)


def test_separable_stem_has_no_batch_norm() -> None:
    keys = [key for key in meta("inception_v2").state_dict() if key.startswith("Conv2d_1a_7x7.")]
    assert keys == ["Conv2d_1a_7x7.depthwise.weight", "Conv2d_1a_7x7.pointwise.weight", "Conv2d_1a_7x7.pointwise.bias"]
    keys = [key for key in meta("inception_v2", stem="plain").state_dict() if key.startswith("Conv2d_1a_7x7.")]
    assert keys[0] == "Conv2d_1a_7x7.conv.weight" and "Conv2d_1a_7x7.conv.bias" not in keys


def test_paper_widths() -> None:
    net = meta("inception_resnet_v2", widths="paper", aux_logits=True)
    assert [len(net.repeat), len(net.repeat_1), len(net.repeat_2)] == [5, 10, 5]
    assert net.feature_info.channels() == [64, 160, 384, 1152, 2144] and net.num_features == 2144
    assert not hasattr(net, "conv2d_7b") and all(block.relu is not None for block in net.repeat_2)
    net = meta("inception_resnet_v1", widths="paper")
    assert net.feature_info.channels() == [64, 192, 256, 896, 1792] and net.head_hidden_size == 1792
    assert not any(key.startswith(("block8", "last_")) for key in net.state_dict())


def test_residual_scales() -> None:
    for name, repeats in (
        ("inception_resnet_v1", "repeat_1 repeat_2 repeat_3"),
        ("inception_resnet_v2", "repeat repeat_1 repeat_2"),
    ):
        net = meta(name)
        scales = [{block.scale for block in net.get_submodule(path)} for path in repeats.split()]
        assert scales == [{0.17}, {0.10}, {0.20}]
        assert net.block8.scale == 1.0 and net.block8.relu is None


def test_embeddings_have_unit_length_and_the_classifier_does_not_see_them() -> None:
    net = create_model("inception_resnet_v1", num_classes=0, embedding_size=128).eval()
    x = torch.randn(3, 3, 80, 80)
    with torch.no_grad():
        y = net(x)
        assert y.shape == (3, 128) and torch.allclose(y.norm(dim=1), torch.ones(3))
        raw = net.forward_head(net.forward_features(x), pre_logits=True)
        assert (raw.norm(dim=1) - 1).abs().max() > 0.1
        net.reset_classifier(4)
        assert torch.equal(net(x), net.logits(raw))


def test_transform_input_undoes_imagenets_statistics() -> None:
    plain = create_model("inception_v1", num_classes=3, convention="tf").eval()
    turned = create_model("inception_v1", num_classes=3, convention="tf", transform_input=True).eval()
    turned.load_state_dict(plain.state_dict(), strict=True)
    image = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        assert relative(turned((image - mean) / std), plain(image * 2 - 1)) < 1e-4


def test_dropout_acts_in_training_only() -> None:
    net = create_model("inception_v1", num_classes=0, drop_rate=0.5)
    f = torch.ones(2, 1024, 1, 1)
    assert (net.train().forward_head(f) == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(net.eval().forward_head(f), torch.ones(2, 1024))


class Doubled(BasicConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Unresettable(nn.Module):
    def __init__(self, cin: int, cout: int, kernel_size: int, **_: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(cout, cin))


@pytest.mark.parametrize("name", ALL)
def test_conv_block_is_injectable(name: str) -> None:
    net = meta(name, conv_block=Doubled, aux_logits=name in ("inception_v1", "inception_v4"))
    plain = [path for path, module in net.named_modules() if type(module) is BasicConv2d]
    assert not plain and sum(type(module) is Doubled for module in net.modules()) > 50
    assert list(net.state_dict()) == list(meta(name, aux_logits=net.aux_logits).state_dict())


def test_conv_block_without_reset_parameters_is_refused() -> None:
    with pytest.raises(TypeError, match=r"conv1 is a Unresettable; allowed: .*reset_parameters"):
        create_model("inception_v1", conv_block=Unresettable)
