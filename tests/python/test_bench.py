"""`tdaengine bench`: what it reports fits together. How fast anything is, is not tested."""

import json

import pytest

from tdaengine import TDA, OptionError, cli
from tdaengine.bench import bench

LENGTHS = {"prefill": [4, 100], "context": [8, 90]}
SETTINGS = {"active=0.5": TDA(active=0.5)}


def check_summary(summary: dict[str, float]) -> None:
    assert set(summary) == {"median", "min", "max"}
    assert 0 < summary["min"] <= summary["median"] <= summary["max"]


def test_result(engine):
    seen = []
    result = bench(
        engine,
        SETTINGS,
        **LENGTHS,
        new_tokens=10,
        rounds=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i + 1, 24) for i in range(24)]  # 4 rounds, the first to warm up, of 6 runs
    assert (result["new_tokens"], result["rounds"]) == (10, 3)
    assert result["peak_rss_bytes"] > engine.weight_bytes
    check_summary(result["read_roof"])
    assert [row["tokens"] for row in result["prefill"]] == LENGTHS["prefill"]
    for row in result["prefill"]:
        check_summary(row["tokens_per_second"])
    names = [(row["context"], row["setting"]) for row in result["decode"]]
    assert names == [(n, name) for n in LENGTHS["context"] for name in ("dense", "active=0.5")]


def test_bandwidth_is_bytes_times_speed(engine):
    result = bench(engine, SETTINGS, **LENGTHS, new_tokens=10, rounds=3)
    roof = result["read_roof"]
    for row in result["decode"]:
        for name, speed in row["tokens_per_second"].items():
            assert row["bytes_per_second"][name] == pytest.approx(speed * row["bytes_per_token"])
        share, bandwidth = row["roof_share"], row["bytes_per_second"]
        check_summary(share)
        assert share["min"] >= bandwidth["min"] / roof["max"] * (1 - 1e-9)
        assert share["max"] <= bandwidth["max"] / roof["min"] * (1 + 1e-9)


def test_bytes_are_those_of_the_context(engine):
    """More tokens in the cache, more bytes; half the neurons, half the bytes of the FFN."""
    rows = bench(engine, SETTINGS, **LENGTHS, new_tokens=10, rounds=1)["decode"]
    short, short_half, long, long_half = (row["bytes_per_token"] for row in rows)
    config = engine.config
    kv_entry = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    kv_bytes = {"f32": 4, "bf16": 2}[engine.kv] * kv_entry
    assert long - short == (90 - 8) * kv_bytes
    ffn = 3 * config.num_layers * config.intermediate_size * config.hidden_size
    assert short - short_half == long - long_half
    assert short - short_half == ffn // 2 * {"f32": 4, "bf16": 2}[engine.weights]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill": [4, 128]}, "prefill: found 128, expected 1 to 127 tokens .max_context 128"),
        ({"context": [119]}, "context: found 119, expected 1 to 118 tokens .max_context 128"),
        ({"prefill": [0]}, "prefill: found 0"),
        ({"context": [-1]}, "context: found -1"),
        ({"new_tokens": 1}, "new_tokens: found 1"),
        ({"rounds": 0}, "rounds: found 0"),
        ({"settings": {"dense": TDA(active=0.5)}}, "'dense' is always there"),
    ],
)
def test_errors(engine, options, message):
    with pytest.raises(OptionError, match=message):
        bench(engine, **{**LENGTHS, "new_tokens": 10, **options})


SHORT = ("--prefill", "4,16", "--context", "8", "--new-tokens", "4", "--rounds", "1")


def test_command(folder, capsys):
    arguments = ["bench", str(folder), "--threads", "1", "--tda", "active=0.5", *SHORT]
    assert cli.main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert (result["path"], result["threads"], result["rounds"]) == (str(folder), 1, 1)
    assert (result["weights"], result["kv"]) == ("f32", "f32")
    assert result["load_seconds"] > 0 and result["weight_bytes"] > 0
    assert [row["tokens"] for row in result["prefill"]] == [4, 16]
    assert [row["setting"] for row in result["decode"]] == ["dense", "active=0.5"]

    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "8/8" in err  # the progress bar
    assert [line.count("|") for line in out.splitlines() if "|" in line] == [3] * 4 + [7] * 4


def test_no_tokenizer_is_needed(folder, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    assert cli.main(["bench", str(tmp_path), *SHORT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decode"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefill", "4,many"], "--prefill: found '4,many', expected numbers"),
        (["--context", ""], "--context: found ''"),
        (["--context", "9000"], "context: found 9000"),
        (["--tda", "speed=1"], "speed"),
    ],
)
def test_command_errors(folder, capsys, arguments, message):
    assert cli.main(["bench", str(folder), *SHORT, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
