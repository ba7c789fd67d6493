from __future__ import annotations

import os
import subprocess
import sys

import mujoco
import numpy as np
import pytest

from robopref.rendering import FlatRenderer, find_camera, no_backend_message, rendering_backend, use_rendering_backend

SCENE = """
<mujoco>
  <visual><global offwidth="8" offheight="8"/></visual>
  <worldbody>
    <light pos="0 -3 3" dir="0 1 -1"/>
    <camera name="front" pos="0 -4 0" xyaxes="1 0 0 0 0 1"/>
    <geom type="box" size="2 0.1 1" pos="0 0 1" rgba="1 0 0 1"/>
    <geom type="box" size="1 0.1 1" pos="-1 0 -1" rgba="0 1 0 1"/>
    <geom type="box" size="1 0.1 1" pos="1 0 -1" rgba="0 0 1 1"/>
  </worldbody>
</mujoco>
"""


@pytest.fixture(scope="module")
def backend() -> str:
    found = use_rendering_backend()
    if found is None:
        pytest.skip(no_backend_message())
    return found


@pytest.fixture
def scene() -> tuple[mujoco.MjModel, mujoco.MjData]:
    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


def test_backend_is_exported_to_this_process_and_its_children(backend: str) -> None:
    assert os.environ["MUJOCO_GL"] == backend
    assert backend in ("egl", "osmesa")


def test_an_unusable_choice_is_honoured_and_found_wanting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert rendering_backend() is None
    assert use_rendering_backend() is None
    assert os.environ["MUJOCO_GL"] == "glfw"


def test_images_are_upright_and_not_mirrored(backend: str, scene: tuple[mujoco.MjModel, mujoco.MjData]) -> None:
    model, data = scene
    renderer = FlatRenderer(model, 48, 64)
    image = renderer.render(data, "front")
    renderer.close()
    assert image.shape == (48, 64, 3)
    assert image.dtype == np.uint8
    assert np.argmax(image[14, 32]) == 0
    assert np.argmax(image[34, 24]) == 1
    assert np.argmax(image[34, 40]) == 2


def test_hidden_groups_are_not_drawn(backend: str, scene: tuple[mujoco.MjModel, mujoco.MjData]) -> None:
    model, data = scene
    model.geom_group[:] = 0, 1, 2
    renderer = FlatRenderer(model, 48, 64, hidden_groups=(0, 2))
    image = renderer.render(data, "front")
    renderer.close()
    assert not image[14, 32].any()
    assert np.argmax(image[34, 24]) == 1
    assert not image[34, 40].any()


def test_costly_effects_are_off(backend: str, scene: tuple[mujoco.MjModel, mujoco.MjData]) -> None:
    model, data = scene
    renderer = FlatRenderer(model, 16, 16)
    renderer.render(data, -1)
    flags = mujoco.mjtRndFlag
    for effect in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION, flags.mjRND_SKYBOX, flags.mjRND_FOG, flags.mjRND_HAZE):
        assert not renderer._scene.flags[effect]
    assert model.vis.quality.offsamples == 0
    renderer.close()


def test_each_image_is_its_own_array(backend: str, scene: tuple[mujoco.MjModel, mujoco.MjData]) -> None:
    model, data = scene
    renderer = FlatRenderer(model, 16, 16)
    first = renderer.render(data, "front")
    kept = first.copy()
    renderer.render(data, find_camera(model, -1))
    np.testing.assert_array_equal(first, kept)
    renderer.close()


def test_a_closed_renderer_says_so(backend: str, scene: tuple[mujoco.MjModel, mujoco.MjData]) -> None:
    model, data = scene
    renderer = FlatRenderer(model, 16, 16)
    renderer.close()
    renderer.close()
    with pytest.raises(RuntimeError, match="closed"):
        renderer.render(data, -1)


@pytest.mark.parametrize("camera", ["back", 1, -2])
def test_unknown_cameras_are_named(scene: tuple[mujoco.MjModel, mujoco.MjData], camera: str | int) -> None:
    with pytest.raises(ValueError, match="front"):
        find_camera(scene[0], camera)


def test_without_a_library_the_error_names_packages(
    monkeypatch: pytest.MonkeyPatch, scene: tuple[mujoco.MjModel, mujoco.MjData]
) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr("robopref.rendering.use_rendering_backend", lambda: None)
    with pytest.raises(RuntimeError, match=r"libegl1 .*libosmesa6"):
        FlatRenderer(scene[0], 16, 16)


def test_a_backend_for_displays_is_refused(
    monkeypatch: pytest.MonkeyPatch, scene: tuple[mujoco.MjModel, mujoco.MjData]
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(RuntimeError, match="MUJOCO_GL=glfw"):
        FlatRenderer(scene[0], 16, 16)


def test_importing_it_loads_neither_mujoco_nor_jax() -> None:
    code = "import sys, robopref.rendering; raise SystemExit(bool({'mujoco', 'jax'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
