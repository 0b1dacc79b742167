"""What an agent does, as frames drawn off screen."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mujoco  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import PPO

from perennial.rl.agent import make_env
from perennial.rl.control import Control
from perennial.storage import RunError, write

Frames = NDArray[np.uint8]


def frames(agent: PPO, control: Control, *, count: int = 8, every: int = 10, size: int = 160, seed: int = 0) -> Frames:
    """Draw an episode of an agent on the ground that it stands on, without exploration. The agent is left as it is.

    Args:
        agent: of :func:`~perennial.rl.make_agent`.
        control: its study.
        count: frames; fewer if the episode ends before.
        every: environment steps from one to the next.
        size: of a frame, pixels.
        seed: of the start.

    Returns:
        uint8 [frames, size, size, 3].

    Raises:
        RunError: no off-screen rendering works here.
    """
    env = make_env(control, 0)
    trained: Any = agent.env
    simulated: Any = env.unwrapped
    simulated.model.geom_friction[:] = trained.envs[0].unwrapped.model.geom_friction
    observation, _ = env.reset(seed=seed)
    drawn: list[Any] = []
    with _camera(simulated.model, simulated.data, size) as take:
        for step in range(count * every):
            if step % every == 0:
                drawn.append(take())
            action, _ = agent.predict(observation, deterministic=True)
            observation, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                break
    return np.stack(drawn)


@contextmanager
def _camera(model: Any, data: Any, size: int) -> Iterator[Callable[[], Frames]]:
    """Takes pictures with the body's own camera. Not by gymnasium's viewer: where there is no context, it raises once
    more when it is thrown away."""
    backend = os.environ.get("MUJOCO_GL") or "egl"
    try:
        context = importlib.import_module(f"mujoco.{backend}").GLContext(size, size)
        context.make_current()
    except Exception as error:  # each backend fails in its own way
        raise RunError(
            f"no frames can be drawn here with MUJOCO_GL={backend}: {type(error).__name__}: {error}. Install EGL "
            "(libegl1), or OSMesa (libosmesa6) and set MUJOCO_GL=osmesa"
        ) from error
    try:
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        drawing = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, drawing)
        scene, options, camera = mujoco.MjvScene(model, 1000), mujoco.MjvOption(), mujoco.MjvCamera()
        camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera("track").id
        area = mujoco.MjrRect(0, 0, size, size)

        def take() -> Frames:
            mujoco.mjv_updateScene(model, data, options, None, camera, mujoco.mjtCatBit.mjCAT_ALL, scene)
            mujoco.mjr_render(area, scene, drawing)
            picture = np.empty((size, size, 3), dtype=np.uint8)
            mujoco.mjr_readPixels(picture, None, area, drawing)
            return picture[::-1].copy()  # OpenGL begins at the bottom

        yield take
        drawing.free()
    finally:
        context.free()


def save_frames(drawn: Frames, path: Path) -> None:
    """Write frames beside each other (``.png``), or one after another as a clip (``.gif``).

    Raises:
        ValueError: the path ends otherwise.
        RunError: it cannot be written.
    """
    from PIL import Image

    buffer = io.BytesIO()
    if path.suffix == ".png":
        Image.fromarray(np.concatenate(list(drawn), axis=1)).save(buffer, "PNG")
    elif path.suffix == ".gif":
        first, *rest = (Image.fromarray(frame) for frame in drawn)
        first.save(buffer, "GIF", save_all=True, append_images=rest, duration=50, loop=0)
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}; frames are saved as .png, a strip, or as .gif, a clip")
    write(path, buffer.getvalue())
