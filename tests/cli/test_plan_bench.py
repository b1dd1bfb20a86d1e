"""`ptee plan` and `ptee bench`: a model with untrained exits, from its name alone."""

from __future__ import annotations

import json

import pytest
import torch
from cases import slow
from command import NETWORK, RANDOM, assert_refused

import ptee
from ptee.backbones.load import load_backbone


def test_plan_prints_a_line_for_each_exit_and_writes_nothing(run, elsewhere):
    done = run("plan", *RANDOM)
    assert (done.status, done.err) == (0, "")
    assert [line.split()[1] for line in done.out.splitlines()[3:6]] == ["layer1", "layer2", "(backbone)"]
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    "more",
    [("plan",), slow(("plan", "--images", 9)), slow(("bench", "--batch-sizes", 1, "--rounds", 3))],
    ids=["plan", "images", "bench"],
)
def test_of_a_file_with_averaged_weights_it_says_which_were_taken(more, run, elsewhere):
    states = [load_backbone("cifar_resnet8", pretrained=False).module.state_dict() for _ in range(2)]
    torch.save({"model": states[0], "model_ema": states[1]}, "w.pth")
    words = (*more, *NETWORK, "--weights", "w.pth", "--num-classes", 10)
    said = "its averaged weights (model_ema) are taken, not the raw ones (model)"
    assert said in run(*words).out
    done = run(*words, "--json")
    assert said in done.err and json.loads(done.out)


def test_plan_as_json_is_all_there_is_on_standard_output(run):
    done = run("plan", *RANDOM, "--head", "conv1", "--json")
    network = load_backbone("cifar_resnet8", pretrained=False, input_size=(3, 16, 16)).module
    want = ptee.plan(network, exits=["layer1", "layer2"], head="conv1", input_size=(3, 16, 16))
    assert json.loads(done.out)["exits"] == json.loads(json.dumps(want.to_dict()))["exits"]


PLACES = {
    "a rule": ("linear", ["--num-exits", 2], 2),
    "fractions": ("0.3,0.6", [], 2),
    "one fraction": ("0.5", [], 1),
    "modules": ("layer1.0,layer2, layer3.0", [], 3),
    "one module": ("layer2", [], 1),
}


@pytest.mark.parametrize(("exits", "more", "count"), PLACES.values(), ids=PLACES)
def test_exits_may_be_a_rule_fractions_or_modules(exits, more, count, run):
    rows = json.loads(run("plan", *RANDOM, "--exits", exits, *more, "--json").out)["exits"]
    assert len(rows) == count
    if exits.startswith("layer"):
        assert [row["name"] for row in rows] == exits.replace(" ", "").split(",")


@pytest.mark.parametrize(("size", "want"), [("32", [3, 32, 32]), ("3,16,24", [3, 16, 24])])
def test_an_input_size_is_one_number_or_three(size, want, run):
    assert json.loads(run("plan", *RANDOM, "--input-size", size, "--json").out)["input_size"] == want


def test_arguments_of_the_model_are_read_as_numbers(run):
    words = ("--model", "cifar_resnet8", "--no-pretrained", "--model-arg", "in_chans=4", "--input-size", "4,16,16")
    assert json.loads(run("plan", *words, "--json").out)["input_size"][0] == 4


def test_bench_times_every_batch_size_and_prints_a_table_or_json(run):
    words = ("bench", *RANDOM, "--head", "pool", "--batch-sizes", "1,2", "--rounds", 3)
    assert "nobody" in run(*words).out
    lines = json.loads(run(*words, "--json").out)["lines"]
    assert {line["batch"] for line in lines} == {1, 2}
    assert {line["executor"] for line in lines} == {"torch", "hooks"}


def test_bench_takes_a_number_of_threads(run):
    done = run("bench", *RANDOM, "--head", "pool", "--batch-sizes", 1, "--rounds", 3, "--threads", 1, "--json")
    assert json.loads(done.out)["times"]["threads"] == 1


REFUSED = {
    "no model": ([], "Give --model NAME, such as --model resnet50"),
    "an unknown model": (["--model", "resnet5000", "--no-pretrained"], "resnet5000.*Did you mean"),
    "a number that is none": ([*RANDOM, "--num-exits", "two"], "--num-exits two"),
    "an unknown placement": ([*RANDOM, "--exits", "paretto"], "paretto.*Did you mean 'pareto'"),
    "neither placement nor module": (
        [*RANDOM, "--exits", "nonsense"],
        r"among them pareto, fine, golden, linear, quadratic, layer1\.0, layer1, ",
    ),
    "an unknown module": ([*RANDOM, "--exits", "layer1,layer9"], "layer9"),
    "a fraction beyond the end": ([*RANDOM, "--exits", "0.5,1.5"], "1.5"),
    "too many exits": ([*RANDOM, "--exits", "linear", "--num-exits", 99], "99"),
    "an unknown head": ([*RANDOM, "--head", "poool"], "poool.*Did you mean 'pool'"),
    "heads for another number of exits": ([*RANDOM, "--head", "pool,pool,pool"], "3 values of head"),
    "a budget for heads that have none": ([*RANDOM, "--head", "pool", "--head-budget", "0.1"], "heads are pool"),
    "a budget of nothing": ([*RANDOM, "--head", "auto", "--head-budget", "0"], "budget 0"),
    "an unknown front network": ([*RANDOM, "--front", "cifar_resnet200"], "cifar_resnet20"),
    "weights of no front network": ([*RANDOM, "--front-weights", "x.safetensors"], "front"),
    "the input behind another exit": ([*RANDOM, "--exits", "layer1,input"], "first of all"),
    "an argument that the model has not": (
        [*RANDOM, "--model-arg", "nonsense=1"],
        r"nonsense=1.*Change --model-arg or --input-size\.",
    ),
    "a model without classifier": (
        ["--model", "vit_small_patch16_dinov3", "--no-pretrained"],
        "Give it one: --num-classes K and --weights FILE",
    ),
    "a size that the model does not take": (
        ["--model", "test_vit", "--no-pretrained", "--model-arg", "img_size=100"],
        "100.*--input-size",
    ),
    "a class alone": ([*NETWORK, "--no-pretrained", "--num-classes", 1], "2 to 1,000,000 classes.*--num-classes"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_plan_refuses_in_one_line_what_cannot_be(words, said, run):
    done = run("plan", *words)
    assert_refused(done, said)
    assert done.out == ""


BENCH = {
    "an unknown device": (["--device", "tpu"], "tpu.*cpu"),
    "batches of nothing": (["--batch-sizes", "0"], "such as --batch-sizes 1,32"),
    "batches of words": (["--batch-sizes", "1,many"], "1,many.* such as 1,32"),
}


@pytest.mark.parametrize(("words", "said"), BENCH.values(), ids=BENCH)
def test_bench_refuses_in_one_line_what_cannot_be(words, said, run):
    assert_refused(run("bench", *RANDOM, "--head", "pool", *words), said)


def test_plan_names_published_networks_that_are_as_good_for_less(run):
    words = ("--no-pretrained", "--input-size", "3,64,64", "--exits", "blocks.2", "--head", "pool")
    done = run("plan", "--model", "mobilenetv2_100", *words)
    assert "ptee advise mobilenetv2_100.ra_in1k" in done.out
    assert "ptee advise" not in run("plan", *RANDOM).out


def test_advise_prints_a_table_and_says_where_its_numbers_are_from(run):
    done = run("advise", "mobilenetv2_100.ra_in1k", "--max-drop", "0,0.01", "--by", "operations")
    assert (done.status, done.err) == (0, "")
    assert "timm's results of" in done.out.lower()
    assert done.out.count("fewest operations") == 2
    found = json.loads(run("advise", "mobilenetv2_100.ra_in1k", "--json").out)
    assert found["own"]["name"] == "mobilenetv2_100.ra_in1k" and len(found["instead"]) == 9


def test_advise_refuses_what_it_does_not_know(run):
    assert_refused(run("advise", "no_such_net"), "Nothing is known of 'no_such_net'")
