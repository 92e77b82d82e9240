"""The memory of every plan at the published sizes, simulated, and the choice between the plans."""

import json
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from shared.config import Memory, Train
from shared.errors import UsageError
from shared.model.geometry import Bucket, video_tokens
from shared.signals import StopSignal
from tests.experiments import changed, fill_cache, write_experiment
from tests.tiny import build_transformer, transformer_config
from tests.train.memory.published import LARGE, SMALL, config_of, predicted, published, published_conventions
from tests.train.transformer.parity import conventions_of
from train.loop import train as train_run
from train.memory import choice as memory
from train.memory.choice import GIB, PREFERENCE, candidates, choose_plans, fill, largest_pack
from train.memory.simulation import Tally, predict_peak, run_on_meta
from train.memory.trial import open_tried
from train.transformer.compiled import compiled_kernels
from train.transformer.engine import Activations, Plan, open_engine

LEAN = Plan("attention_output", offload_activations=True, stream_weights=2)
OFFLOADED = replace(LEAN, stream_weights=0)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(("activations", "units"), [("block_input", 1), ("attention_output", 2), ("full", 10)])
def test_a_block_keeps_what_the_formula_says_and_no_more(activations: Activations, units: int) -> None:
    unit = 2 * (226 + video_tokens(SMALL, 2, None)) * 48 * 64
    few, more = (predicted("5b", Plan(activations), num_layers=layers).kept for layers in (2, 3))
    assert more - few == pytest.approx(units * unit, rel=0.05)


@pytest.mark.parametrize(
    ("variant", "bucket", "plan", "limit_gib"),
    [
        ("5b", SMALL, LEAN, 4.5),
        ("5b", SMALL, replace(OFFLOADED, base_precision="int8"), 8.5),
        ("5b", SMALL, OFFLOADED, 13.0),
        ("2b", SMALL, LEAN, 2.6),
        ("1.5-5b", LARGE, LEAN, 8.5),
    ],
    ids=["5b-lean", "5b-int8", "5b-offloaded", "2b-lean", "1.5-5b-lean"],
)
def test_peaks_at_the_published_sizes(variant: str, bucket: Bucket, plan: Plan, limit_gib: float) -> None:
    assert 0.7 * limit_gib < predicted(variant, plan, bucket).peak / GIB < limit_gib


@pytest.mark.parametrize("plan", [LEAN, Plan("attention_output", full_blocks=3)])
def test_extrapolation_equals_a_run_of_the_whole_depth(plan: Plan) -> None:
    deep = predicted("2b", plan, Bucket(9, 256, 256), num_layers=6)
    whole = run_on_meta(
        published("2b") | {"num_layers": 6},
        published_conventions("2b"),
        Train.model_validate({"output_dir": "unused", "lora_rank": 64, "lora_alpha": 64}),
        replace(plan, attention="math"),
        [Bucket(9, 256, 256)],
        torch.bfloat16,
    )
    assert deep.peak == pytest.approx(whole.peak, rel=0.002)
    assert deep.kept == pytest.approx(whole.kept, rel=0.002)


def test_tally_counts_what_is_live_once_and_no_host_buffer() -> None:
    with Tally() as tally:
        first = torch.empty(1000, dtype=torch.uint8, device="meta")
        view = first[10:]
        host = tally.uncounted(5000, torch.device("meta"))
        host[:1000].copy_(first)
        second = first + 1
        del first
        assert tally.num_bytes == 2048, "the view keeps its storage"
        del view
        assert tally.num_bytes == 1024
        third = second + 1
        assert (tally.num_bytes, tally.peak_bytes) == (2048, 2048)
        del second, third
        assert (tally.num_bytes, tally.peak_bytes) == (0, 2048)


@pytest.mark.parametrize(
    ("fields", "train", "expected"),
    [
        ({}, {}, list(PREFERENCE)),
        ({"activations": "block_input"}, {}, {"block_input"}),
        ({}, {"gradient_checkpointing": True}, {"block_input"}),
        ({"stream_weights": 4}, {}, {"full", "attention_output"}),
        ({"full_blocks": 3}, {}, {"full", "attention_output"}),
        ({"offload_activations": True, "activations": "full"}, {}, {"full"}),
    ],
)
def test_fields_that_are_set_stay_and_auto_fills_the_rest(fields: Any, train: Any, expected: Any) -> None:
    plans = candidates(config_of({"compile": False} | fields, **train), CUDA)
    if isinstance(expected, list):
        assert plans == expected
    assert isinstance(expected, list) or {plan.activations for plan in plans} == expected
    assert all(getattr(plan, name) == value for plan in plans for name, value in fields.items())


@pytest.mark.parametrize(
    ("fields", "train", "message"),
    [
        ({"activations": "full"}, {"gradient_checkpointing": True}, "memory.activations = 'full': .* 'block_input'"),
        ({"base_precision": "int8"}, {"use_dora": True}, "use_dora"),
    ],
)
def test_contradictions_are_refused(fields: Any, train: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        candidates(config_of(fields, **train), CUDA)


def test_compile_and_attention_reach_the_engine() -> None:
    assert not any(plan.compile for plan in candidates(config_of({}), CPU)), "auto, on a CPU"
    for compiled in (True, False):
        (plan, *_) = candidates(config_of({"compile": compiled, "attention": "math"}), CPU)
        engine = open_engine(build_transformer("5b", lora_rank=4), plan, CPU)
        assert (engine.kernels is not None) == compiled and engine.attention == "math"


@pytest.mark.faults
def test_auto_goes_eager_without_a_compiler_and_true_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from torch._inductor import config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(memory, "candidates", lambda *_: [Plan("full", compile=True)])
    compiled_kernels.cache_clear()
    arguments = build_transformer("5b", lora_rank=4), published_conventions("5b"), [SMALL], CPU
    with inductor.patch({"cpp.cxx": ("/no/such/compiler",)}):
        assert choose_plans(config_of({}), *arguments)[0] == Plan("full")
        said = [line for line in capsys.readouterr().err.splitlines() if "compil" in line]
        assert len(said) <= 3 and "memory: not compiled, because compiling fails here" in said[0], said
        with pytest.raises(UsageError, match=r"memory.compile = true: compiling fails here .*use 'auto' or false"):
            choose_plans(config_of({"compile": True}), *arguments)[0]
    compiled_kernels.cache_clear()


@pytest.mark.parametrize(("free", "full_blocks"), [(99, 0), (119, 0), (120, 2), (130, 3), (165, 6), (10**6, 9)])
def test_full_blocks_fill_the_memory_that_is_left(free: int, full_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "RESERVED_PER_ALLOCATED", 1.0)

    def peak(plan: Plan) -> int:
        return 100 + 10 * plan.full_blocks

    plan, needed = fill(Plan("attention_output"), 100, free, 10, peak)
    assert plan.full_blocks == full_blocks and needed == peak(plan)


def choice(monkeypatch: pytest.MonkeyPatch, free: list[int]) -> Plan:
    """Return the plan of processes on GPUs with so many free bytes each, for a tiny 5B on one small clip."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 0))
    monkeypatch.setattr(memory, "all_gather", lambda own: [own, *free[1:]])
    transformer, config = build_transformer("5b", lora_rank=4), config_of({"compile": False})
    return choose_plans(config, transformer, conventions_of("5b"), [Bucket(9, 64, 96)], CUDA)[0]


def test_auto_takes_the_fastest_plan_that_fits_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = transformer_config("5b"), conventions_of("5b"), config_of({}).train
    found = predict_peak(*model, Plan(), [Bucket(9, 64, 96)], torch.float32)
    enough = int(found.peak * memory.RESERVED_PER_ALLOCATED)
    assert choice(monkeypatch, [enough]).activations == "full"
    told = f"(predicted {enough / GIB:.2f} GiB for 9x64x96, {enough / GIB:.2f} GiB free on cuda)"
    assert capsys.readouterr().err.strip() == f"memory: activations full {told}"
    plan = choice(monkeypatch, [enough - 1])
    assert plan.activations == "attention_output" and plan.full_blocks == 0, "two blocks are too few to differ"
    assert choice(monkeypatch, [2**50, 0]) == LEAN, "the fullest card decides for all processes"
    assert "this may not fit, and is the leanest that [memory] leaves" in capsys.readouterr().err


def test_largest_pack_holds_the_largest_clip_as_often_as_it_fits() -> None:
    conventions = published_conventions("5b")
    buckets = [Bucket(9, 64, 96), SMALL]
    tokens = 226 + 13 * 30 * 45
    for budget, batch, count in [(1, 8, 1), (2 * tokens, 8, 2), (2 * tokens - 1, 8, 1), (9 * tokens, 4, 4)]:
        train = Train(output_dir=Path("unused"), max_tokens_per_pack=budget, global_batch_size=batch)
        assert largest_pack(train, conventions, buckets) == [SMALL] * count


def test_a_lean_run_and_a_full_run_train_the_same_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_experiment("1.5-5b", tmp_path, max_train_steps=2, lora_rank=4, lora_alpha=4, validation_steps=2)
    config = changed(config, data={"held_out_clips": 1})
    fill_cache(config)
    lean = Memory(activations="attention_output", offload_activations=True, stream_weights=2)
    arms = {"full": Memory(), "lean": lean, "int8": Memory(base_precision="int8", activations="block_input")}
    adapters, held_out = {}, {}
    for name, fields in arms.items():
        own = changed(config, train={"output_dir": tmp_path / name}).model_copy(update={"memory": fields})
        with StopSignal() as stop:
            train_run(own, stop)
        adapters[name] = load_file(tmp_path / name / "export" / "pytorch_lora_weights.safetensors")
        held_out[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["held_out_loss"]
    assert "cosine of the adapter's gradient" in capsys.readouterr().err
    assert adapters["full"].keys() == adapters["lean"].keys() == adapters["int8"].keys()
    assert held_out["lean"] == pytest.approx(held_out["full"], rel=1e-4)
    assert held_out["int8"] == pytest.approx(held_out["full"], rel=1e-2) and held_out["int8"] != held_out["full"]
    worst = max(float((adapters["lean"][key] - value).abs().max()) for key, value in adapters["full"].items())
    assert worst < 1e-5


class Limit(TorchDispatchMode):
    """A card with so many bytes: what is allocated beyond them is out of memory."""

    def __init__(self, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit, self.held, self.most = limit, 0, 0
        self.known: set[int] = set()

    def __enter__(self) -> "Limit":
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and (key := value.untyped_storage()._cdata) not in self.known:
                self.known.add(key)
                self.held += value.untyped_storage().nbytes()
                weakref.finalize(value.untyped_storage(), self.free, key, value.untyped_storage().nbytes())
        self.most = max(self.most, self.held)
        if self.held > self.limit:
            raise torch.OutOfMemoryError(f"{self.held} bytes of {self.limit}")
        return result

    def free(self, key: int, num_bytes: int) -> None:
        self.known.discard(key)
        self.held -= num_bytes


def test_a_plan_that_runs_out_of_memory_is_given_up_for_a_leaner_one(capsys: pytest.CaptureFixture[str]) -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", lora_rank=4, num_layers=6)
    weights = {name: value.clone() for name, value in transformer.named_parameters()}
    plans, pack = [Plan("full"), Plan("block_input")], [Bucket(9, 128, 192)] * 2
    needed = []
    for plan in plans:
        with Limit(10**12) as unlimited:
            _, trial = open_tried(transformer, [plan], conventions, pack, CPU)
        assert trial.plan == plan and trial.peak_memory_bytes > 0
        assert all(value.grad is None for value in transformer.parameters()), "the first step would add them"
        needed.append(unlimited.most)
    with Limit(sum(needed) // 2):
        engine, trial = open_tried(transformer, plans, conventions, pack, CPU)
    assert engine.activations == trial.plan.activations == "block_input"
    assert "activations full runs out of memory with 2 x 9x128x192" in " ".join(capsys.readouterr().err.split())
    with (
        Limit(needed[1] // 2),
        pytest.raises(UsageError, match="activations block_input runs out of memory"),
    ):
        open_tried(transformer, plans, conventions, pack, CPU)
    for name, value in transformer.named_parameters():
        assert torch.equal(value, weights[name]) and value.grad is None


def test_every_process_gives_up_a_plan_that_fails_on_one(tmp_path: Path) -> None:
    conventions, plans, pack = conventions_of("5b"), [Plan("full"), Plan("block_input")], [Bucket(9, 128, 192)] * 2
    transformer = build_transformer("5b", lora_rank=4, num_layers=6)
    needed, children = list[int](), list[int]()
    for plan in plans:
        with Limit(10**12) as unlimited:
            open_tried(transformer, [plan], conventions, pack, CPU)
        needed.append(unlimited.most)
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 9
            try:
                distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=rank, world_size=2)
                with Limit(sum(needed) // 2 if rank else 10**12):
                    _, trial = open_tried(transformer, plans, conventions, pack, CPU)
                code = plans.index(trial.plan)
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [1, 1]


def test_a_resident_model_can_be_opened_again_with_streamed_weights() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", lora_rank=4)
    for plan in (LEAN, replace(OFFLOADED, base_precision="int8"), replace(LEAN, base_precision="int8")):
        engine, trial = open_tried(transformer, [plan], conventions, [Bucket(9, 64, 96)], CPU)
        assert engine.offload is not None and trial.plan == plan
