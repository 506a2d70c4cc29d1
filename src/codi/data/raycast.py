"""Batched analytic ray caster: scenes -> images, metric depth and instance masks, on any torch device.

One primary ray and one shadow ray per sample, closed-form intersections, Lambert shading with an ambient sky term;
shiny solids add a Phong highlight and a Fresnel-weighted reflection of the sky. Computed in linear light,
returned as sRGB.
Coordinates: x right, y up, z away from the camera; the floor is y = 0; lengths in meters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .scenes import COLOURS, FLOORS, MAX_OBJECTS, SHAPES, Scene

FIELD_OF_VIEW = 0.72  # radians, horizontally and vertically
LOOK_AT = (0.0, 0.45, 5.8)
FAR = 65.0  # meters; depth is clipped here so that millimeters fit 16 bits
_MISS = 1e9

# (zenith, horizon, sunlight, ambient) in linear light.
_LIGHT = {
    "noon": ((0.18, 0.36, 0.72), (0.62, 0.74, 0.86), (1.05, 1.00, 0.92), (0.30, 0.33, 0.38)),
    "sunset": ((0.16, 0.14, 0.32), (0.85, 0.42, 0.20), (0.95, 0.62, 0.38), (0.28, 0.23, 0.25)),
    "night": ((0.004, 0.006, 0.02), (0.03, 0.04, 0.09), (0.22, 0.25, 0.34), (0.07, 0.08, 0.12)),
}

Vector = tuple[Tensor, Tensor, Tensor]


@dataclass
class Render:
    """Rendered scenes: `image` is uint8 (B, 3, S, S) sRGB, `depth` float32 (B, S, S) in meters along the optical axis,
    0 for sky, `mask` uint8 (B, S, S), 0 for background, k for the k-th solid of the scene (1-based)."""

    image: Tensor
    depth: Tensor
    mask: Tensor


def _dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _nearest_root(a: Tensor, half_b: Tensor, c: Tensor) -> Tensor:
    """Return the smaller root of a t^2 + 2 half_b t + c = 0, or _MISS if it is not in front."""
    disc = half_b * half_b - a * c
    t = (-half_b - disc.clamp_min(0).sqrt()) / a
    return torch.where((disc > 0) & (t > 0), t, _MISS)


def _sphere(o: Vector, d: Vector, r: Tensor) -> Tensor:
    o = (o[0], o[1] - r, o[2])
    return _nearest_root(_dot(d, d), _dot(o, d), _dot(o, o) - r * r)


def _cap(o: Vector, d: Vector, r: Tensor, height: Tensor) -> Tensor:
    t = (height - o[1]) / d[1]
    x, z = o[0] + t * d[0], o[2] + t * d[2]
    return torch.where((t > 0) & (x * x + z * z < r * r), t, _MISS)


def _cylinder(o: Vector, d: Vector, r: Tensor) -> Tensor:
    height = 1.7 * r
    a = (d[0] * d[0] + d[2] * d[2]).clamp_min(1e-9)
    t = _nearest_root(a, o[0] * d[0] + o[2] * d[2], o[0] * o[0] + o[2] * o[2] - r * r)
    y = o[1] + t * d[1]
    side = torch.where((y >= 0) & (y <= height), t, _MISS)
    return torch.minimum(side, _cap(o, d, r, height))


def _cone(o: Vector, d: Vector, r: Tensor) -> Tensor:
    height = 2.0 * r
    k2 = (r / height) ** 2
    y0 = o[1] - height
    a = d[0] * d[0] + d[2] * d[2] - k2 * d[1] * d[1]
    half_b = o[0] * d[0] + o[2] * d[2] - k2 * y0 * d[1]
    c = o[0] * o[0] + o[2] * o[2] - k2 * y0 * y0
    root = (half_b * half_b - a * c).clamp_min(0).sqrt()
    hit = half_b * half_b - a * c > 0
    best = torch.full_like(root, _MISS)
    for sign in (-1.0, 1.0):  # `a` changes sign with the slope of the ray, so either root may be the nearer one
        t = (-half_b + sign * root) / torch.where(a.abs() < 1e-9, 1e-9, a)
        y = o[1] + t * d[1]
        best = torch.where(hit & (t > 0) & (y >= 0) & (y <= height), torch.minimum(best, t), best)
    return best


def _box(o: Vector, d: Vector, r: Tensor) -> Tensor:
    half, height = 0.85 * r, 1.6 * r
    near, far = torch.full_like(d[0] + o[0], -_MISS), torch.full_like(d[0] + o[0], _MISS)
    for axis, (low, high) in enumerate(((-half, half), (torch.zeros_like(r), height), (-half, half))):
        inv = 1.0 / torch.where(d[axis].abs() < 1e-9, 1e-9, d[axis])
        t1, t2 = (low - o[axis]) * inv, (high - o[axis]) * inv
        near, far = torch.maximum(near, torch.minimum(t1, t2)), torch.minimum(far, torch.maximum(t1, t2))
    return torch.where((near < far) & (near > 0), near, _MISS)


def _normal(shape: str, p: Vector, r: Tensor) -> Vector:
    """Return the outward unit normal at surface points `p`, in the solid's own frame."""
    x, y, z = p
    if shape == "sphere":
        return x / r, (y - r) / r, z / r
    if shape == "box":
        half, height = 0.85 * r, 1.6 * r
        faces = torch.stack((x / half, (y / height) * 2 - 1, z / half))
        axis = faces.abs().argmax(0)
        n = [torch.where(axis == i, faces[i].sign(), 0.0) for i in range(3)]
        return n[0], n[1], n[2]
    rho = (x * x + z * z).sqrt().clamp_min(1e-9)
    if shape == "cylinder":
        top = (y > 1.7 * r - 1e-3) & (rho < r - 1e-3)
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        return torch.where(top, zero, x / rho), torch.where(top, one, zero), torch.where(top, zero, z / rho)
    side, up = 2.0 / math.sqrt(5.0), 1.0 / math.sqrt(5.0)  # cone of height 2 r
    return side * x / rho, torch.full_like(x, up), side * z / rho


_INTERSECT = {"sphere": _sphere, "box": _box, "cylinder": _cylinder, "cone": _cone}


class _Solids:
    """All solids of a batch of scenes, grouped by shape, so that each is intersected only with its own formula."""

    def __init__(self, scenes: Sequence[Scene], device: torch.device) -> None:
        rows = [(b, k, s) for b, scene in enumerate(scenes) for k, s in enumerate(scene.solids)]
        self.batch = len(scenes)
        self.groups = {}
        for shape in SHAPES:
            members = [(b, k, s) for b, k, s in rows if s.shape == shape]
            if members:
                index = torch.tensor([b * MAX_OBJECTS + k for b, k, _ in members], device=device)
                numbers = [(s.x, s.z, s.radius, math.cos(s.yaw), math.sin(s.yaw)) for _, _, s in members]
                self.groups[shape] = (index, torch.tensor(numbers, device=device).T[:, :, None])

    @staticmethod
    def _local(values: Tensor, o: Vector, d: Vector) -> tuple[Vector, Vector]:
        """Transform ray origins and directions to the frame of a solid."""
        x, z, _, cos, sin = values
        ox, oz = o[0] - x, o[2] - z
        return (cos * ox - sin * oz, o[1], sin * ox + cos * oz), (
            cos * d[0] - sin * d[2],
            d[1],
            sin * d[0] + cos * d[2],
        )

    def distances(self, o: Vector, d: Vector) -> Tensor:
        """Return the ray parameters of the first hits, (B, MAX_OBJECTS, R), or _MISS. `o`, `d`: (B, R or 1)."""
        rays = max(o[0].shape[1], d[0].shape[1])
        out = torch.full((self.batch * MAX_OBJECTS, rays), _MISS, device=d[0].device)
        for shape, (index, values) in self.groups.items():
            scene = index // MAX_OBJECTS
            lo, ld = self._local(values, tuple(c[scene] for c in o), tuple(c[scene] for c in d))  # type: ignore[arg-type]
            out[index] = _INTERSECT[shape](lo, ld, values[2])
        return out.view(self.batch, MAX_OBJECTS, rays)

    def normals(self, owner: Tensor, p: Vector) -> Vector:
        """Return world-space unit normals (B, R) at the hits of ray r on solid `owner[b, r]` (-1: none, returns up)."""
        n = torch.zeros(3, *owner.shape, device=owner.device)
        n[1] = 1.0
        for shape, (index, values) in self.groups.items():
            for i, flat in enumerate(index.tolist()):
                b, k = divmod(flat, MAX_OBJECTS)
                rays = (owner[b] == k).nonzero()[:, 0]
                if not len(rays):
                    continue
                v = values[:, i]
                point = (p[0][b, rays], p[1][b, rays], p[2][b, rays])
                local, _ = self._local(v, point, point)
                lx, ly, lz = _normal(shape, local, v[2])
                cos, sin = v[3], v[4]
                n[:, b, rays] = torch.stack((cos * lx + sin * lz, ly, -sin * lx + cos * lz))
        return n[0], n[1], n[2]


def _sky(zenith: Tensor, horizon: Tensor, up: Tensor) -> Tensor:
    """Return the color of the sky (3, B, R) for direction heights `up` (B, R); `zenith`, `horizon` (3, B, 1)."""
    blend = up.clamp(0, 1).sqrt()
    return horizon + (zenith - horizon) * blend


@torch.no_grad()
def render(scenes: Sequence[Scene], size: int = 64, supersample: int = 2, device: str | torch.device = "cpu") -> Render:
    """Render a batch of scenes at `size` x `size` pixels, with `supersample`^2 rays per pixel.

    Depth and mask are point samples (the sample nearest the pixel center), never averages across an edge.
    Raises ValueError for a size outside 32..512.
    """
    if not 32 <= size <= 512:
        raise ValueError(f"size {size} is outside 32..512 pixels")
    device = torch.device(device)
    side, batch = size * supersample, len(scenes)

    def column(values) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32, device=device).reshape(batch, 1)

    def colors(values) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32, device=device).T.reshape(3, batch, 1)

    # Camera: at (0, height, 0), looking at LOOK_AT; rows run down the image.
    height = column(s.camera_height for s in scenes)
    pitch = torch.atan2(height - LOOK_AT[1], torch.full_like(height, LOOK_AT[2]))
    grid = ((torch.arange(side, device=device) + 0.5) / side * 2 - 1) * math.tan(FIELD_OF_VIEW / 2)
    v, u = (g.reshape(1, -1) for g in torch.meshgrid(-grid, grid, indexing="ij"))
    dx, dy, dz = u.expand(batch, -1), v * pitch.cos() - pitch.sin(), v * pitch.sin() + pitch.cos()
    d: Vector = (dx, dy, dz)  # optical-axis component 1, so the ray parameter is the metric depth
    o: Vector = (torch.zeros_like(height), height, torch.zeros_like(height))

    solids = _Solids(scenes, device)
    nearest, owner = solids.distances(o, d).min(dim=1)
    floor = torch.where(dy < -1e-6, -height / dy.clamp_max(-1e-6), _MISS)
    is_solid = nearest < floor
    t = torch.minimum(nearest, floor)
    is_sky = t > 1e6
    owner = torch.where(is_solid, owner, -1)
    travel = t.clamp_max(200.0)
    p: Vector = (travel * dx, height + travel * dy, travel * dz)
    n = solids.normals(owner, p)

    # Albedo: floor (checkered cells of 0.9 m) or the solid's color.
    cell = ((p[0] / 0.9).floor() + (p[2] / 0.9).floor()).remainder(2)
    # Far cells are smaller than a sample: fade them to their mean to avoid aliasing.
    cell = 0.5 + (cell - 0.5) * (1 - (travel - 12) / 14).clamp(0, 1)
    checkered = column(s.pattern == "checkered" for s in scenes)
    albedo = colors(FLOORS[s.floor] for s in scenes) * (1 - 0.62 * checkered * cell)
    palette = torch.zeros(3, batch, MAX_OBJECTS, device=device)
    shiny = torch.zeros(batch, MAX_OBJECTS, device=device)
    for b, scene in enumerate(scenes):
        for k, s in enumerate(scene.solids):
            palette[:, b, k] = torch.tensor(COLOURS[s.colour])
            shiny[b, k] = s.material == "shiny"
    pick = owner.clamp_min(0)
    albedo = torch.where(is_solid, palette.gather(2, pick.expand(3, -1, -1)), albedo)
    gloss = torch.where(is_solid, shiny.gather(1, pick), 0.0)

    # Light.
    azimuth, elevation = column(s.sun_azimuth for s in scenes), column(s.sun_elevation for s in scenes)
    elevation = torch.where(column(s.time == "sunset" for s in scenes) > 0, elevation * 0.45, elevation)
    sun: Vector = (azimuth.sin() * elevation.cos(), elevation.sin(), -azimuth.cos() * elevation.cos())
    zenith, horizon, sunlight, ambient = (colors(_LIGHT[s.time][i] for s in scenes) for i in range(4))
    haze = column(s.haze for s in scenes)
    zenith = zenith + 0.35 * haze * (horizon - zenith)
    lift = 2e-3  # meters off the surface, so that a point does not shadow itself
    start: Vector = (p[0] + lift * n[0], p[1] + lift * n[1], p[2] + lift * n[2])
    lit = (solids.distances(start, sun).amin(dim=1) > 1e6).float()
    diffuse = _dot(n, sun).clamp_min(0) * lit
    color = albedo * (ambient * (0.75 + 0.25 * n[1]) + sunlight * diffuse)

    # Shiny: reflect the view about the normal; Schlick's Fresnel term weighs the mirrored sky.
    norm = _dot(d, d).rsqrt()
    cos = -_dot(d, n) * norm
    r: Vector = (d[0] * norm + 2 * cos * n[0], d[1] * norm + 2 * cos * n[1], d[2] * norm + 2 * cos * n[2])
    fresnel = 0.06 + 0.94 * (1 - cos.clamp(0, 1)) ** 5
    mirrored = torch.where(r[1] > 0, _sky(zenith, horizon, r[1]), albedo.new_tensor(0.15) * ambient)
    highlight = sunlight * (_dot(r, sun).clamp_min(0) ** 60 * lit * 1.2)
    color = color + gloss * (fresnel * (mirrored - color) + highlight)

    # Haze blends the distant floor into the color of the horizon.
    sky = _sky(zenith, horizon, dy * norm)
    fog = 1 - torch.exp(-((travel / 26) ** 2))
    color = torch.where(is_sky, sky, color + torch.where(is_solid, 0.0, fog) * (horizon - color))

    linear = color.permute(1, 0, 2).reshape(batch, 3, size, supersample, size, supersample).mean((3, 5)).clamp(0, 1)
    srgb = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp_min(1e-8) ** (1 / 2.4) - 0.055)
    center = slice(supersample // 2, None, supersample)
    depth = torch.where(is_sky, 0.0, t.clamp_max(FAR)).view(batch, side, side)[:, center, center]
    mask = (owner + 1).to(torch.uint8).view(batch, side, side)[:, center, center]
    return Render((srgb * 255).round().to(torch.uint8), depth.contiguous(), mask.contiguous())
