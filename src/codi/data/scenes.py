"""Procedural scenes with exact captions and exact edits.

A scene has one to four solids on a floor under a sky. Captions are true of their scene, and edits do exactly what their
instruction says, so every task has an exact ground truth. `raycast` renders scenes as images.

Each scene is drawn from its own random stream, keyed by (seed, split, index): the same key always gives the same scene,
and streams of different splits are independent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

# Linear-light albedo of the eight object colors.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.75, 0.03, 0.03),
    "orange": (0.90, 0.25, 0.01),
    "yellow": (0.85, 0.70, 0.03),
    "green": (0.04, 0.50, 0.05),
    "cyan": (0.03, 0.65, 0.65),
    "blue": (0.03, 0.08, 0.75),
    "purple": (0.25, 0.03, 0.60),
    "pink": (0.90, 0.10, 0.42),
}
SHAPES = ("sphere", "box", "cylinder", "cone")
MATERIALS = ("matte", "shiny")
SIZES: dict[str, float] = {"small": 0.42, "large": 0.72}  # radius, meters
FLOORS: dict[str, tuple[float, float, float]] = {
    "white": (0.75, 0.75, 0.75),
    "gray": (0.30, 0.30, 0.31),
    "brown": (0.42, 0.33, 0.25),
}
PATTERNS = ("plain", "checkered")
TIMES = ("noon", "sunset", "night")
EDITS = ("recolour", "material", "shape", "remove", "floor", "time")
SPLITS = ("train", "held-out", "composition")
# Color-shape pairs that occur in no "train" or "held-out" scene, and at least once in each "composition" scene.
UNSEEN_PAIRS = (("purple", "sphere"), ("green", "box"), ("orange", "cylinder"), ("cyan", "cone"))
MAX_OBJECTS = 4


@dataclass(frozen=True)
class Solid:
    """One object standing on the floor; `x` (right) and `z` (away from the camera) in meters, `yaw` in radians."""

    shape: str
    colour: str
    material: str
    size: str
    x: float
    z: float
    yaw: float

    @property
    def radius(self) -> float:
        return SIZES[self.size]

    @property
    def phrase(self) -> str:
        return f"{self.size} {self.material} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """All parameters of a rendered image. Angles in radians, lengths in meters."""

    solids: tuple[Solid, ...]
    floor: str
    pattern: str
    time: str
    sun_azimuth: float
    sun_elevation: float
    camera_height: float
    haze: float  # 0..1, paleness of the sky

    @property
    def caption(self) -> str:
        names = [f"a {s.phrase}" for s in self.solids]
        things = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else "nothing"
        return f"{things} on a {self.floor} {self.pattern} floor at {self.time}"


@dataclass(frozen=True)
class Edit:
    """A change to a scene: its `instruction` and the scene afterwards (`target`)."""

    kind: str
    instruction: str
    target: Scene


def _stream(seed: int, split: str, index: int, purpose: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: use one of {', '.join(SPLITS)}")
    return np.random.default_rng([seed, SPLITS.index(split), index, purpose])


def _choice(rng: np.random.Generator, options):
    options = tuple(options)
    return options[int(rng.integers(len(options)))]


def _collide(a: Solid, b: Solid) -> bool:
    """Return True if two solids intersect or the nearer one hides the center line of the other."""
    near = min(a, b, key=lambda s: s.z)
    # 1.21 > 0.85 sqrt(2), a box's half diagonal in radii: solids stay apart at any yaw, also after a shape edit.
    apart = np.hypot(a.x - b.x, a.z - b.z) > 1.21 * (a.radius + b.radius)
    visible = abs(a.x / a.z - b.x / b.z) > near.radius / near.z
    return not (apart and visible)


def sample_scene(seed: int, split: str, index: int, count: int | None = None) -> Scene:
    """Draw the scene with this key. `count` fixes the number of solids (1..4); None draws it.

    Solids never intersect or hide one another's centers; they are sorted from left to right, as in the caption.
    """
    rng = _stream(seed, split, index, 0)
    drawn = 1 + int(rng.choice(MAX_OBJECTS, p=(0.35, 0.30, 0.20, 0.15)))
    num_solids = drawn if count is None else count
    solids: list[Solid] = []
    attempt = 0
    while len(solids) < num_solids:
        if attempt == 200:  # the solids so far leave no room: start again
            attempt, solids = 0, []
        needs_unseen = split == "composition" and not solids
        while True:
            colour, shape = _choice(rng, COLOURS), _choice(rng, SHAPES)
            if ((colour, shape) in UNSEEN_PAIRS) == needs_unseen or (split == "composition" and solids):
                break
        # Late attempts use the small size, which nearly always fits.
        size = _choice(rng, SIZES) if attempt < 100 else "small"
        attempt += 1
        z = float(rng.uniform(4.6, 7.2))
        x = float(rng.uniform(-0.32, 0.32)) * z  # the center is always inside the image
        solid = Solid(shape, colour, _choice(rng, MATERIALS), size, x, z, yaw=float(rng.uniform(0, np.pi / 2)))
        if not any(_collide(solid, other) for other in solids):
            solids.append(solid)
    return Scene(
        solids=tuple(sorted(solids, key=lambda s: s.x)),
        floor=_choice(rng, FLOORS),
        pattern=_choice(rng, PATTERNS),
        time=_choice(rng, TIMES),
        sun_azimuth=float(rng.uniform(-1.2, 1.2)),
        sun_elevation=float(rng.uniform(0.6, 1.1)),
        camera_height=float(rng.uniform(1.6, 2.8)),
        haze=float(rng.uniform(0, 1)),
    )


def sample_edit(scene: Scene, seed: int, split: str, index: int, kind: str | None = None) -> Edit:
    """Draw an exact edit of `scene`. `kind` is one of EDITS; None draws one.

    The instruction names an object by the fewest words that identify it. Edits never create an unseen color-shape pair.
    """
    rng = _stream(seed, split, index, 1)
    kind = _choice(rng, EDITS) if kind is None else kind
    number = int(rng.integers(len(scene.solids)))
    solid = scene.solids[number]
    name = _shortest_name(scene, solid)

    def other(options, current, allowed=lambda option: True):
        return _choice(rng, [o for o in options if o != current and allowed(o)])

    def swap(**change):
        changed = list(scene.solids)
        changed[number] = replace(solid, **change)
        return replace(scene, solids=tuple(changed))

    if kind == "recolour":
        colour = other(COLOURS, solid.colour, lambda c: (c, solid.shape) not in UNSEEN_PAIRS)
        return Edit(kind, f"make the {name} {colour}", swap(colour=colour))
    if kind == "material":
        material = other(MATERIALS, solid.material)
        return Edit(kind, f"make the {name} {material}", swap(material=material))
    if kind == "shape":
        shape = other(SHAPES, solid.shape, lambda s: (solid.colour, s) not in UNSEEN_PAIRS)
        return Edit(kind, f"turn the {name} into a {shape}", swap(shape=shape))
    if kind == "remove":
        solids = tuple(s for i, s in enumerate(scene.solids) if i != number)
        return Edit(kind, f"remove the {name}", replace(scene, solids=solids))
    if kind == "floor":
        options = [(f, p) for f in FLOORS for p in PATTERNS if (f, p) != (scene.floor, scene.pattern)]
        floor, pattern = _choice(rng, options)
        return Edit(kind, f"change the floor to {floor} {pattern}", replace(scene, floor=floor, pattern=pattern))
    if kind == "time":
        time = other(TIMES, scene.time)
        return Edit(kind, f"make it {time}", replace(scene, time=time))
    raise ValueError(f"edit {kind!r} is unknown: use one of {', '.join(EDITS)}")


def _shortest_name(scene: Scene, solid: Solid) -> str:
    """Return the fewest words that identify `solid` in its scene, e.g. "sphere", "red sphere", "small red sphere"."""
    for fields in (("shape",), ("colour", "shape"), ("material", "colour", "shape")):
        words = [getattr(solid, f) for f in fields]
        if sum([getattr(s, f) for f in fields] == words for s in scene.solids) == 1:
            return " ".join(words)
    if sum(s.phrase == solid.phrase for s in scene.solids) == 1:
        return solid.phrase
    twins = [s for s in scene.solids if s.phrase == solid.phrase]
    return f"{('first', 'second', 'third', 'fourth')[twins.index(solid)]} {solid.phrase}"
