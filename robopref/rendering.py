"""Offscreen images of MuJoCo scenes on machines without a display.

MuJoCo draws through an OpenGL library that the machine must have: EGL or OSMesa. Which of them works can only be found
out by drawing, and a library that fails may take the process with it, so `rendering_backend` tries each one in a
process of its own. `FlatRenderer` then draws without the effects that cost most on a processor (antialiasing, shadows,
reflections, sky, fog), which makes it about ten times as fast as MuJoCo's defaults.

This module imports neither MuJoCo nor JAX until something is drawn.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import mujoco

VARIABLE = "MUJOCO_GL"
"""The environment variable by which MuJoCo is told which OpenGL library to use."""

BACKENDS = ("egl", "osmesa")

_PROBE = """
from robopref.rendering import FlatRenderer
import mujoco
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><geom size='1' rgba='1 1 1 1'/><light pos='0 0 4'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = FlatRenderer(model, 16, 16)
image = renderer.render(data, -1)
renderer.close()
raise SystemExit(0 if image.any() else 1)
"""


class FlatRenderer:
    """Draws a MuJoCo model into images of a fixed size, without costly effects.

    The OpenGL library is the one named by `MUJOCO_GL`; where that is unset, the first one that works is found and set.

    Args:
        model: its `vis` section is changed: no antialiasing, and an offscreen buffer of at least this size.
        height: of the images, in pixels.
        width: of the images, in pixels.
        hidden_groups: groups of geometry that are not drawn, such as shapes that are only for collisions.

    Raises:
        RuntimeError: no OpenGL library on this machine can draw.
    """

    def __init__(self, model: mujoco.MjModel, height: int, width: int, *, hidden_groups: Sequence[int] = ()) -> None:
        backend = os.environ.get(VARIABLE, "").lower() or use_rendering_backend()
        if backend is None:
            raise RuntimeError(no_backend_message())
        if backend not in BACKENDS:
            raise RuntimeError(f"{VARIABLE}={backend} needs a display; set it to egl or osmesa, or unset it.")
        import mujoco

        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, height)
        try:
            # Asked for directly because `mujoco.Renderer` is bound to what the variable said when MuJoCo was imported.
            self._context: Any = importlib.import_module(f"mujoco.{backend}").GLContext(width, height)
            self._context.make_current()
            self._drawer = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except (ImportError, AttributeError, RuntimeError, mujoco.FatalError) as error:
            raise RuntimeError(f"{VARIABLE}={backend} cannot draw ({error}). {no_backend_message()}") from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._drawer)
        self._model = model
        self._scene = mujoco.MjvScene(model, maxgeom=10_000)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[list(hidden_groups)] = 0
        self._area = mujoco.MjrRect(0, 0, width, height)

    def render(self, data: mujoco.MjData, camera: str | int | mujoco.MjvCamera) -> npt.NDArray[np.uint8]:
        """Draws the scene as `camera` sees it: [H, W, 3], the first row at the top.

        Args:
            camera: the name or index of a camera of the model, -1 for MuJoCo's default view, or a camera of one's own.

        Raises:
            ValueError: the model has no such camera.
            RuntimeError: the renderer has been closed.
        """
        import mujoco

        if self._context is None:
            raise RuntimeError("this renderer has been closed; make a new one to draw again.")
        view = camera if isinstance(camera, mujoco.MjvCamera) else find_camera(self._model, camera)
        self._context.make_current()
        mujoco.mjv_updateScene(self._model, data, self._options, None, view, mujoco.mjtCatBit.mjCAT_ALL, self._scene)
        flag = mujoco.mjtRndFlag
        for effect in (flag.mjRND_SHADOW, flag.mjRND_REFLECTION, flag.mjRND_SKYBOX, flag.mjRND_FOG, flag.mjRND_HAZE):
            self._scene.flags[effect] = 0
        mujoco.mjr_render(self._area, self._scene, self._drawer)
        pixels = np.empty((self._area.height, self._area.width, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, self._area, self._drawer)
        return np.ascontiguousarray(pixels[::-1])

    def close(self) -> None:
        """Frees the drawing context; harmless when called again."""
        if self._context is not None:
            self._drawer.free()
            self._context.free()
            self._context = None


def find_camera(model: mujoco.MjModel, camera: str | int) -> mujoco.MjvCamera:
    """The camera of `model` with this name or index, -1 being MuJoCo's default view of the whole scene.

    Raises:
        ValueError: the model has no such camera.
    """
    import mujoco

    view = mujoco.MjvCamera()
    if camera == -1:
        mujoco.mjv_defaultFreeCamera(model, view)
        return view
    names = [model.camera(index).name for index in range(model.ncam)]
    if camera not in names and camera not in range(model.ncam):
        raise ValueError(f"there is no camera {camera!r}; the model has {', '.join(names) or 'none'}.")
    view.type = mujoco.mjtCamera.mjCAMERA_FIXED
    view.fixedcamid = names.index(camera) if isinstance(camera, str) else camera
    return view


def rendering_backend() -> str | None:
    """The OpenGL library by which MuJoCo can draw on this machine: "egl", "osmesa", or None.

    Each candidate is tried in a process of its own. Where `MUJOCO_GL` is set, only what it names is tried.
    """
    wanted = os.environ.get(VARIABLE, "").lower()
    return next((backend for backend in ((wanted,) if wanted else BACKENDS) if _can_render(backend)), None)


def use_rendering_backend() -> str | None:
    """Finds an OpenGL library that works and sets it for this process and those it starts; None where there is none."""
    backend = rendering_backend()
    if backend is not None:
        os.environ[VARIABLE] = backend
    return backend


def no_backend_message() -> str:
    """What to tell a person whose machine cannot draw."""
    return (
        "No OpenGL library for drawing without a display was found: on Debian or Ubuntu install "
        "`libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0` (EGL) or `libosmesa6` (OSMesa)."
    )


def _can_render(backend: str) -> bool:
    if backend not in BACKENDS:
        return False
    environment = {**os.environ, VARIABLE: backend, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("PYOPENGL_PLATFORM", None)
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return probe.returncode == 0
