"""Broken and hostile files: data or a model, or a refusal of one line; little memory and time.

Each kind of file is made whole, then spoilt in ways that hypothesis chooses, always the same.
"""

import functools
import io
import json
import pathlib
import shutil
import zipfile
from collections.abc import Callable
from typing import Any, get_args

import gymnasium
import h5py
import hypothesis.strategies as st
import minari
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from minari.data_collector import EpisodeBuffer
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from reward_jax.data import hdf5
from reward_jax.data.checkpoint import load_guide, load_model, save_guide, save_model
from reward_jax.data.episodes import Episodes
from reward_jax.data.files import read_episodes
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.models.stable_diffusion.schedulers import SchedulerName, plan
from reward_jax.studies.maze.report import _reward_map
from reward_jax.torch_import.from_torch import Kind, load_torch
from reward_jax.torch_import.stable_diffusion import check_stable_diffusion
from tests.hostile import CHANGES, bounded, check_json, fuzzed, spoil
from tests.reward.cli_runs import model, reward
from tests.reward.studies.i2p import tiny
from tests.reward.torch_import.test_from_torch import H, diffusion, trainer, unet, value_function

LENGTHS = (7, 4, 9)
STEPS = sum(LENGTHS)


def check_bytes(path: pathlib.Path, call: Callable[[], Any], heads: Any, examples: int = 25):
    """A file with bytes spoilt anywhere, or among the first so many of `heads`."""
    whole = path.read_bytes()
    call()

    @settings(fuzzed, max_examples=examples)
    @given(CHANGES, st.sampled_from([*heads, None]))
    def check(changes, most):
        path.write_bytes(spoil(whole, changes, most))
        with bounded():
            call()

    check()


def test_hdf5(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "d.hdf5"
    episodes = Episodes(
        observations=rng.normal(size=(STEPS, 3)).astype(np.float32),
        actions=rng.normal(size=(STEPS, 2)).astype(np.float32),
        lengths=np.array(LENGTHS),
        about={"environment": "x"},
        arrivals=np.array([1, 2, 3]),
        goals=rng.normal(size=(3, 2)).astype(np.float32),
        rewards=rng.normal(size=STEPS).astype(np.float32),
        terminations=np.arange(STEPS) == 6,
    )
    hdf5.write(path, episodes)

    def read():
        found = hdf5.read(path)
        assert len(found.observations) == len(found.actions) == found.lengths.sum() <= 2**24

    whole = path.read_bytes()
    check_bytes(path, read, [2500], examples=60)
    path.write_bytes(whole)
    check_items(path, read, examples=100)


def huge(group: Any, name: str) -> None:
    group.create_dataset(name, (10**9, 4), np.float32, chunks=True)


PUT: dict[str, Callable[[Any, str], Any]] = {
    "nothing": lambda group, name: None,
    "a group": lambda group, name: group.create_group(name),
    "what it does not hold": huge,
    "without a shape": lambda group, name: group.create_dataset(name, data=h5py.Empty("f")),
    "a loop": lambda group, name: group.__setitem__(name, h5py.SoftLink(group.name)),
    "a link to nothing": lambda group, name: group.__setitem__(name, h5py.SoftLink("/none")),
    "another's": lambda group, name: group.__setitem__(name, h5py.SoftLink("/metadata/about")),
    **{
        f"{value!r:.20}": lambda group, name, value=value: group.__setitem__(name, value)
        for value in (
            *(0, -1.5, True, "text", b"\xff", 1j, np.float64(1e300), np.int64(-(2**63))),
            *(np.zeros((0, 4)), np.zeros((4, 0)), np.zeros((3, 3, 3)), np.zeros(0)),
            *(np.full((STEPS, 3), np.nan), np.full(STEPS, 2**62), np.full((STEPS, 3), 1j)),
            *(np.array(["a"] * STEPS, "S1"), np.zeros(STEPS, "i4,f4"), np.zeros(STEPS, "V8")),
        )
    },
}


def check_items(path: pathlib.Path, call: Callable[[], Any], examples: int) -> None:
    """An HDF5 file with one or two of its items, or their attributes, replaced by others."""
    whole, names = path.read_bytes(), []
    with h5py.File(path) as file:
        file.visit(names.append)
        marks = [(name, key) for name in ["/", *names] for key in file[name].attrs]
    values = st.sampled_from([0, -1, 2**62, 1e300, float("nan"), "x", True, np.zeros((2, 2))])

    @settings(fuzzed, max_examples=examples)
    @given(
        st.lists(st.tuples(st.sampled_from(names), st.sampled_from(sorted(PUT))), max_size=2),
        st.lists(st.tuples(st.sampled_from(marks), values), max_size=1) if marks else st.just([]),
    )
    def check(items, attributes):
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            for (name, key), value in attributes:
                file[name].attrs[key] = value
            for name, what in items:
                if name in file:
                    del file[name]
                group, _, own = name.rpartition("/")
                if isinstance(parent := file.get(group or "/"), h5py.Group):
                    PUT[what](parent, own)
        with bounded():
            call()

    check()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The folder of a Minari dataset with goals."""
    root = tmp_path_factory.mktemp("minari")
    rng = np.random.default_rng(0)

    def vector(width):
        return gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float64)

    keys = {"observation": 4, "desired_goal": 2}
    buffers: list[Any] = []
    for length in LENGTHS:
        buffers.append(
            EpisodeBuffer(
                observations={k: rng.normal(size=(length + 1, n)) for k, n in keys.items()},
                actions=rng.uniform(-1, 1, (length, 2)),  # pyright: ignore[reportArgumentType]
                rewards=rng.normal(size=length).tolist(),
                terminations=[False] * length,
                truncations=[False] * (length - 1) + [True],
            )
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        minari.create_dataset_from_buffers(
            "a-v0",
            buffers,
            observation_space=gymnasium.spaces.Dict({k: vector(n) for k, n in keys.items()}),
            action_space=vector(2),
        )
    return root / "a-v0"


def whole_dataset(folder):
    found = read_episodes(folder)
    assert len(found.observations) == len(found.actions) == found.lengths.sum() <= 2**24


@pytest.mark.filterwarnings("ignore")
def test_minari_arrays(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "m")
    path = tmp_path / "m/data/main_data.hdf5"
    check_bytes(path, lambda: whole_dataset(tmp_path / "m"), [4000], examples=60)
    shutil.copy(dataset / "data/main_data.hdf5", path)
    check_items(path, lambda: whole_dataset(tmp_path / "m"), examples=100)


@pytest.mark.filterwarnings("ignore")
def test_minari_metadata(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "m")
    path = tmp_path / "m/data/metadata.json"
    check_json(path, lambda: whole_dataset(tmp_path / "m"), settings(fuzzed, max_examples=100))
    shutil.copy(dataset / "data/metadata.json", path)
    check_bytes(path, lambda: whole_dataset(tmp_path / "m"), [])


@pytest.mark.filterwarnings("ignore")
def test_minari_spaces(dataset, tmp_path):
    """The spaces stand in the metadata as JSON in texts."""
    shutil.copytree(dataset, tmp_path / "m")
    path = tmp_path / "m/data/metadata.json"
    whole, space = json.loads(path.read_text()), tmp_path / "space.json"
    for name in ("observation_space", "action_space"):
        space.write_text(whole[name])

        def read(name=name):
            path.write_text(json.dumps(whole | {name: space.read_text()}))
            whole_dataset(tmp_path / "m")

        read()
        check_json(space, read, settings(fuzzed, max_examples=60))


def torch_file(path):
    torch.save(trainer(diffusion(net=unet(mults=(1,)))), path)
    return path


def test_torch_files(tmp_path):
    path = torch_file(tmp_path / "a.pt")
    check_bytes(path, lambda: load_torch(path, "denoiser"), [300], examples=60)


def spoilt_entry(path: pathlib.Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """One file of the archive changed, and its checksum with it."""
    with zipfile.ZipFile(path) as old:
        files = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for inside, data in files.items():
            new.writestr(inside, change(data) if inside.endswith(name) else data)


def test_torch_pickles(tmp_path):
    whole = torch_file(tmp_path / "a.pt").read_bytes()
    path = tmp_path / "b.pt"

    @settings(fuzzed, max_examples=100)
    @given(CHANGES, st.sampled_from([400, None]), st.sampled_from(["/data.pkl", "/data/3"]))
    def check(changes, most, name):
        path.write_bytes(whole)
        spoilt_entry(path, name, lambda data: spoil(data, changes, most))
        with bounded():
            load_torch(path, "denoiser")

    check()


ODD: list[Callable[[torch.Tensor], Any]] = [
    lambda x: x.new_zeros(1).expand(10**4, 10**5),
    lambda x: x.new_zeros(1).expand(10**6, *x.shape),
    lambda x: x.new_zeros(0, *x.shape),
    lambda x: x.new_zeros(()),
    lambda x: x[..., None],
    lambda x: x.reshape(-1),
    lambda x: x.new_full(x.shape, float("nan")),
    lambda x: x.new_full(x.shape, 1e38),
    lambda x: x.to(torch.int64),
    lambda x: x.to(torch.bool),
    lambda x: x.double() * 1e300,
    lambda x: x.T if x.ndim == 2 else x,
    lambda x: 2**70,
    lambda x: -1.5,
    lambda x: None,
    lambda x: "x",
    lambda x: [x] * 3,
    lambda x: {"a": {"b": x}},
    lambda x: torch.nn.Parameter(x) if x.is_floating_point() else x,
]


@pytest.mark.parametrize("kind", get_args(Kind))
def test_torch_states(kind, tmp_path):
    """Tensors replaced by others, or by what is none; names left out, added and moved."""
    module = diffusion(net=unet(mults=(1,))) if kind == "denoiser" else value_function(mults=(4,))
    state, path = dict(module.state_dict()), tmp_path / "a.pt"
    names = sorted(state)

    @fuzzed
    @given(
        st.sampled_from(names),
        st.sampled_from(ODD),
        st.sampled_from(["replaced", "removed", "renamed", "deeper"]),
    )
    def check(name, make, how):
        spoilt = dict(state)
        own = spoilt.pop(name)
        if how == "replaced":
            spoilt[name] = make(own)
        elif how == "renamed":
            spoilt[name + ".0"] = own
        content = {"step": make(own), "model": spoilt} if how == "deeper" else spoilt
        buffer = io.BytesIO()
        torch.save(content, buffer)
        path.write_bytes(buffer.getvalue())
        with bounded():
            load_torch(path, kind, horizon=H)

    check()


@pytest.mark.parametrize("kind", ["model", "reward"])
def test_models_of_ours(kind, tmp_path):
    path, text = tmp_path / "m.safetensors", tmp_path / "header.json"
    if kind == "model":
        save_model(path, model(3, about={"task": "open", "goal": [0.5, -1.0]}))
    else:
        save_guide(path, reward(1, 3))

    def read():
        found: Any = (load_model if kind == "model" else load_guide)(path, TrajectorySpace)
        assert found.space.width < 2**20

    check_bytes(path, read, [16, 1500])
    save_model(path, model(3)) if kind == "model" else save_guide(path, reward(1, 3))
    with safe_open(path, "numpy") as file:
        text.write_text(file.metadata()["reward_jax"])
    arrays = load_file(path)

    def with_header():
        save_file(arrays, path, {"reward_jax": text.read_text()})
        read()

    check_json(text, with_header, settings(fuzzed, max_examples=100))


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory):
    """The folder of a Stable Diffusion, of which a network's weights have an index."""
    folder = tiny.save(tmp_path_factory.mktemp("diffusers"))
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("a.safetensors"))
    places = dict.fromkeys(load_file(weights.with_name("a.safetensors")), "a.safetensors")
    index = weights.with_suffix(".safetensors.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
    ],
)
def test_a_diffusers_folder(diffusers_folder, tmp_path, name):
    """What is taken gives chains that stay on the schedule, too, or is refused by them."""
    folder = shutil.copytree(diffusers_folder, tmp_path / "sd")

    def read():
        found = check_stable_diffusion(folder).scheduler
        for scheduler in get_args(SchedulerName):
            t = np.asarray(plan(found, scheduler, 5).rows.t)
            assert ((t >= 0) & (t < found.steps)).all()

    read()
    check_json(folder / name, read)


def test_maps_of_a_reward(tmp_path):
    for name, save in (("plain", np.savez), ("packed", np.savez_compressed)):
        folder = tmp_path / name
        folder.mkdir()
        save(folder / "maps.npz", reward=np.zeros((4, 5)))
        check_bytes(folder / "maps.npz", functools.partial(_reward_map, folder), [60], 100)
