"""ffmpeg: a video file -> frames, one view or many.

Shapes: F frames of a video, S frame side in pixels.
"""
import subprocess
from concurrent.futures import ThreadPoolExecutor

import imageio_ffmpeg
import numpy as np

from plumbing.cli import UserError

VIDEO_ENDINGS = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm",
                 ".wmv")


class VideoError(UserError):
    """A file that holds no video that can be decoded. Its text is one line: the file, then ffmpeg's reason."""


def read_frames(path, fps, size, crop="center", flip=False, resize=None):
    """Decodes a video -> uint8 (F, S, S, 3), RGB.

    fps: frames a second. size: S, the side of the square crop in pixels. resize: length of the frame's shorter side
    before the crop (default: S). crop: "center", "top-left" or "bottom-right". flip: mirrored left to right.
    A video shorter than one sampling interval gives its first frame; a damaged one gives what decodes.
    Raises VideoError where nothing does, and UserError for a crop of another name or larger than the frame.
    """
    return read_views(path, fps, size, [(resize or size, crop, flip)])[0]


def read_views(path, fps, size, views, span=None):
    """One decode, several views: a list of (resize, crop, flip) as in `read_frames` -> uint8 (views, F, S, S, 3).

    span: only the file's frames first <= n < last, where given.
    ffmpeg resamples, scales and crops, and stacks the views into one tall picture: nothing at full size is piped.
    """
    places = {"center": "", "top-left": ":0:0", "bottom-right": ":iw-ow:ih-oh"}
    for resize, crop, _ in views:
        if crop not in places or resize < size:
            raise UserError(f"no crop {crop!r} of {size} pixels from a shorter side of {resize}: "
                            f"choose one of {', '.join(places)}, and a side of {size} or more")
    names = [f"v{i}" for i in range(len(views))]
    graph = f"split={len(views)}" + "".join(f"[{name}]" for name in names)
    for name, (resize, crop, flip) in zip(names, views):
        graph += (f";[{name}]scale={resize}:{resize}:force_original_aspect_ratio=increase,"
                  f"crop={size}:{size}{places[crop]}{',hflip' if flip else ''},format=rgb24[{name}o]")
    graph += ";" + "".join(f"[{name}o]" for name in names) + (f"vstack={len(views)}" if len(views) > 1 else "null")
    trim = f"trim=start_frame={span[0]}:end_frame={span[1]},setpts=PTS-STARTPTS," if span else ""
    pixels, reason = _ffmpeg(path, f"{trim}fps={fps},{graph}")
    if not pixels:  # shorter than one interval: the fps filter rounds it down to nothing
        pixels, reason = _ffmpeg(path, trim + graph, "-frames:v", "1")
    if not pixels:
        raise VideoError(f"{path}: {reason}")
    frame = len(views) * size * size * 3
    frames = np.frombuffer(pixels[:len(pixels) // frame * frame], np.uint8).reshape(-1, len(views), size, size, 3)
    return frames.swapaxes(0, 1).copy()


def _ffmpeg(path, graph, *options):
    """Runs ffmpeg on a file -> (raw RGB bytes, the last line it complained with)."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-threads", "1", "-i", f"file:{path}", "-an",
               "-sn", "-dn", "-vf", graph, *options, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=False)
    complaints = done.stderr.decode(errors="replace").strip().splitlines()
    return done.stdout, complaints[-1] if complaints else "it holds no video frames"


def decode_all(paths, read, workers):
    """Decodes files with several ffmpeg processes at a time, in order -> yields (path, frames or VideoError).

    read: path -> frames. At most 2 x workers decoded videos wait at any moment.
    """
    def attempt(path):
        try:
            return path, read(path)
        except VideoError as error:
            return path, error

    with ThreadPoolExecutor(workers) as pool:  # threads suffice: the work is done in ffmpeg's own processes
        waiting = []
        for path in paths:
            waiting.append(pool.submit(attempt, path))
            if len(waiting) >= 2 * workers:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
