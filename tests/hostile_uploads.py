"""Uploads that no honest client sends, built in code: files, and forms around a good file.

Each says what the service answers. What is secret in them must be stored nowhere.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np

SECRET = b"Jane-Doe-4711"
ARABIC_DATE = "\u0662\u0660\u0662\u0664-01-01".encode()
BOUNDARY = b"dermrayboundary"
MULTIPART = "multipart/form-data; boundary=" + BOUNDARY.decode()
# What the corpus is sent to: small, so that a picture that passes its limits by a trick is soon noticed.
MAX_IMAGE_BYTES, MAX_PIXELS = 2_000_000, 1_000_000


@dataclass(frozen=True)
class HostileFile:
    """One file for the `image` field, and the status it gets."""

    name: str
    build: Callable[[], bytes]
    status: int


@dataclass(frozen=True)
class HostileForm:
    """One request body; `headers` beside it."""

    name: str
    build: Callable[[], bytes]
    status: int
    content_type: str | None = MULTIPART
    headers: dict[str, str] = field(default_factory=dict)


def pixels(width: int = 64, height: int = 48) -> np.ndarray:
    """uint8 BGR with structure everywhere: a cut file cannot decode to the same."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def encode(suffix: str, *options: int, width: int = 64, height: int = 48) -> bytes:
    return cv2.imencode(suffix, pixels(width, height), options)[1].tobytes()


def jpeg(*options: int) -> bytes:
    return encode(".jpg", *options)


def segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def after_start(*segments: bytes) -> bytes:
    """A good JPEG with segments before its own."""
    data = jpeg()
    return data[:2] + b"".join(segments) + data[2:]


def frame(data: bytes) -> int:
    """Where the frame header of a baseline or progressive JPEG starts."""
    return next(at for at in (data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) if at >= 0)


def with_frame(marker: int = 0xC0, precision: int = 8, width: int = 64, height: int = 48) -> bytes:
    """A good JPEG whose frame header says something else."""
    data = jpeg()
    at = frame(data)
    header = struct.pack(">BBHBHH", 0xFF, marker, 17, precision, height, width)
    return data[:at] + header + data[at + len(header) :]


def scan(data: bytes) -> int:
    """Where the compressed data of the first scan starts."""
    at = data.find(b"\xff\xda")
    return at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]


def hidden_frame() -> bytes:
    """libjpeg takes 0xFF00 for garbage and reads on; who takes it for a segment skips a large picture's header."""
    large = encode(".jpg", width=5000, height=4000)[2:64_000]
    return b"\xff\xd8" + segment(0x00, large) + jpeg()[2:]


def many_scans(count: int) -> bytes:
    data = jpeg(cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    last = data.rfind(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def exif(orientation: int = 1) -> bytes:
    """EXIF with a description, an orientation and a GPS position."""
    text = SECRET + b"\0"
    entries = 3
    text_at = 8 + 2 + 12 * entries + 4
    gps_at = text_at + len(text) + len(text) % 2
    directory = struct.pack(">H", entries)
    directory += struct.pack(">HHII", 0x010E, 2, len(text), text_at)
    directory += struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    directory += struct.pack(">HHII", 0x8825, 4, 1, gps_at)
    gps = struct.pack(">H", 1) + struct.pack(">HHI4s", 1, 2, 2, b"N\0\0\0") + struct.pack(">I", 0)
    tiff = b"MM\0*\0\0\0\x08" + directory + bytes(4) + text.ljust(gps_at - text_at, b"\0") + gps
    return b"Exif\0\0" + tiff


def chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def png_of(width: int, height: int, depth: int, colour: int, rows: bytes, *between: bytes, interlace: int = 0) -> bytes:
    """A PNG of filtered rows; `between` comes after the header."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    parts = chunk(b"IHDR", header), *between, chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rows_of(height: int, length: int) -> bytes:
    """Rows of pseudo-random bytes without a filter."""
    values = np.random.default_rng(1).integers(0, 256, (height, length), np.uint8)
    return np.hstack([np.zeros((height, 1), np.uint8), values]).tobytes()


def grey_png(*between: bytes, width: int = 64, height: int = 48) -> bytes:
    return png_of(width, height, 8, 0, rows_of(height, width), *between)


def png_bomb(side: int = 13_000) -> bytes:
    """One bit a pixel, all alike: 169 million pixels in some 20 KB."""
    return png_of(side, side, 1, 0, bytes((1 + (side + 7) // 8) * side))


def interlaced_png(side: int = 16) -> bytes:
    rows = b""
    for x, y, step_x, step_y in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        rows += rows_of(len(range(y, side, step_y)), len(range(x, side, step_x)))
    return png_of(side, side, 8, 0, rows, interlace=1)


def palette_png() -> bytes:
    rows = np.hstack([np.zeros((48, 1), np.uint8), np.random.default_rng(2).integers(0, 4, (48, 64), np.uint8)])
    colours = chunk(b"PLTE", bytes(range(12))), chunk(b"tRNS", bytes([0, 128, 255, 64]))
    return png_of(64, 48, 8, 3, rows.tobytes(), *colours)


def bomb(megabytes: int = 200) -> bytes:
    """Zeros, a thousand to one."""
    return zlib.compress(bytes(megabytes * 2**20), 9)


def animated_png(width: int = 64, height: int = 48) -> bytes:
    """Two frames; the second says a size of its own."""
    control = struct.pack(">IIIIIHHBB", 0, 64, 48, 0, 0, 1, 10, 0, 0)
    second = struct.pack(">IIIIIHHBB", 1, width, height, 0, 0, 1, 10, 0, 0)
    data = grey_png(chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", control))
    frames = chunk(b"fcTL", second) + chunk(b"fdAT", struct.pack(">I", 2) + zlib.compress(rows_of(48, 64)))
    return data[:-12] + frames + data[-12:]


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP"
    for kind, payload in chunks:
        body += kind + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def canvas(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"VP8X", bytes([flags, 0, 0, 0]) + sizes


def vp8() -> tuple[bytes, bytes]:
    data = encode(".webp", cv2.IMWRITE_WEBP_QUALITY, 80)
    at = data.find(b"VP8 ")
    return b"VP8 ", data[at + 8 : at + 8 + struct.unpack("<I", data[at + 4 : at + 8])[0]]


def animated_webp(width: int = 64, height: int = 48) -> bytes:
    """Two frames on a canvas; both frames' headers say this size."""
    kind, payload = vp8()
    sizes = bytes(6) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + b"\x64\0\0\0"
    picture = sizes + kind + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)
    return riff(canvas(64, 48, 0x02), (b"ANIM", bytes(6)), (b"ANMF", picture), (b"ANMF", picture))


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("payload.class", SECRET * 20)
    return buffer.getvalue()


def files() -> list[HostileFile]:
    """Every file, by what is wrong with it."""
    cut = {share: jpeg()[: int(len(jpeg()) * share)] for share in (0.02, 0.3, 0.6, 0.99)}
    baseline = jpeg()
    restarts = jpeg(cv2.IMWRITE_JPEG_RST_INTERVAL, 1)
    good = encode(".png")
    webp = encode(".webp", cv2.IMWRITE_WEBP_QUALITY, 80)
    text = chunk(b"tEXt", b"Patient\0" + SECRET)
    packed = zlib.compress(SECRET)
    return [
        # No picture, or none of the three kinds.
        HostileFile("empty", lambda: b"", 422),
        HostileFile("one byte", lambda: b"\xff", 415),
        HostileFile("zeros", lambda: bytes(5000), 415),
        HostileFile("only a JPEG signature", lambda: b"\xff\xd8\xff", 422),
        HostileFile("only a PNG signature", lambda: b"\x89PNG\r\n\x1a\n", 422),
        HostileFile("only a WebP signature", lambda: b"RIFF\x04\0\0\0WEBP", 422),
        HostileFile("GIF", lambda: b"GIF89a\x40\0\x30\0\x80\0\0" + bytes(500), 415),
        HostileFile("BMP", lambda: encode(".bmp"), 415),
        HostileFile("TIFF", lambda: encode(".tiff"), 415),
        HostileFile("JPEG 2000", lambda: encode(".jp2"), 415),
        HostileFile("AVIF", lambda: b"\0\0\0\x20ftypavif" + bytes(300), 415),
        HostileFile("SVG with a script", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>", 415),
        HostileFile("HTML", lambda: b"<!doctype html><script>alert(1)</script>", 415),
        HostileFile("PDF", lambda: b"%PDF-1.7\n" + bytes(300), 415),
        HostileFile("ZIP", archive, 415),
        HostileFile("executable", lambda: b"MZ" + bytes(300), 415),
        HostileFile("shell script", lambda: b"#!/bin/sh\nrm -rf /\n", 415),
        HostileFile("WAV in RIFF", lambda: b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), 415),
        HostileFile("ZIP before a JPEG", lambda: archive() + jpeg(), 415),
        HostileFile("byte order mark before a JPEG", lambda: b"\xef\xbb\xbf" + jpeg(), 415),
        HostileFile("larger than the limit", lambda: jpeg() + bytes(MAX_IMAGE_BYTES), 413),
        # JPEG.
        HostileFile("JPEG cut in its header", lambda: cut[0.02], 422),
        HostileFile("JPEG cut in its tables", lambda: cut[0.3], 422),
        HostileFile("JPEG cut in its data", lambda: cut[0.6], 422),
        HostileFile("JPEG without its last bytes", lambda: cut[0.99], 422),
        HostileFile("JPEG without a scan", lambda: baseline[: baseline.find(b"\xff\xda")] + b"\xff\xd9", 422),
        HostileFile("JPEG of 65535x65535", lambda: with_frame(width=65535, height=65535), 413),
        HostileFile("JPEG of no height", lambda: with_frame(height=0), 422),
        HostileFile("JPEG of 4x4", lambda: encode(".jpg", width=4, height=4), 422),
        HostileFile("JPEG of 12 bits", lambda: with_frame(marker=0xC1, precision=12), 422),
        HostileFile("JPEG with arithmetic codes", lambda: with_frame(marker=0xC9), 422),
        HostileFile("lossless JPEG", lambda: with_frame(marker=0xC3), 422),
        HostileFile("hierarchical JPEG", lambda: with_frame(marker=0xC5), 422),
        HostileFile("JPEG with a frame header hidden in garbage", hidden_frame, 422),
        HostileFile("JPEG with garbage before its tables", lambda: after_start(SECRET), 415),
        HostileFile("JPEG with a reserved marker", lambda: after_start(segment(0x02, SECRET)), 422),
        HostileFile("JPEG with a second start", lambda: after_start(b"\xff\xd8"), 422),
        HostileFile(
            "JPEG with a second, large frame header",
            lambda: (
                baseline[: scan(baseline)]
                + with_frame(width=20_000, height=20_000)[frame(baseline) : frame(baseline) + 19]
                + baseline[scan(baseline) :]
            ),
            422,
        ),
        HostileFile("JPEG with a segment of length 0", lambda: after_start(b"\xff\xe1\0\0"), 422),
        HostileFile("JPEG with a segment beyond its end", lambda: after_start(b"\xff\xe1\xff\xff"), 422),
        HostileFile("JPEG of 2000 scans", lambda: many_scans(2000), 422),
        HostileFile("JPEG of 24 scans", lambda: many_scans(14), 200),
        HostileFile("progressive JPEG", lambda: jpeg(cv2.IMWRITE_JPEG_PROGRESSIVE, 1), 200),
        HostileFile("grey JPEG", lambda: cv2.imencode(".jpg", pixels()[:, :, 0])[1].tobytes(), 200),
        HostileFile("JPEG with fill bytes", lambda: after_start(b"\xff" * 5000), 200),
        HostileFile("JPEG with restart markers in its header", lambda: after_start(b"\xff\xd3\xff\xd0"), 200),
        HostileFile("JPEG with restart markers", lambda: restarts, 200),
        HostileFile(
            "JPEG with restart markers out of order",
            lambda: restarts.replace(b"\xff\xd1", b"\xff\xd5"),
            200,
        ),
        HostileFile("JPEG with EXIF and GPS", lambda: after_start(segment(0xE1, exif())), 200),
        HostileFile("turned JPEG", lambda: after_start(segment(0xE1, exif(orientation=6))), 200),
        HostileFile(
            "JPEG with a thumbnail",
            lambda: after_start(segment(0xE1, exif() + encode(".jpg", width=8, height=8) + SECRET)),
            200,
        ),
        HostileFile(
            "JPEG with XMP, IPTC, profile and comment",
            lambda: after_start(
                segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x>" + SECRET),
                segment(0xED, b"Photoshop 3.0\0" + SECRET),
                segment(0xE2, b"ICC_PROFILE\0\x01\x01" + SECRET),
                segment(0xFE, SECRET),
            ),
            200,
        ),
        HostileFile(
            "JPEG with text in segments that decoders skip",
            lambda: after_start(
                segment(0xEE, b"notes" + SECRET),
                segment(0xEE, b"Adobe\0\x64\0\0\0\0\x01" + SECRET),
                segment(0xE0, b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0" + SECRET),
            ),
            200,
        ),
        HostileFile("JPEG with text in a DNL segment", lambda: after_start(segment(0xDC, b"\0\x30" + SECRET)), 422),
        HostileFile("JPEG with 25 segments of 64 KB", lambda: after_start(*[segment(0xE5, SECRET * 5000)] * 25), 200),
        HostileFile("JPEG with a JPEG behind it", lambda: jpeg() + SECRET + jpeg(), 200),
        HostileFile("JPEG with a ZIP behind it", lambda: jpeg() + archive(), 200),
        HostileFile("JPEG with a script behind it", lambda: jpeg() + b"<?php /* " + SECRET * 9 + b" */ ?>", 200),
        # libjpeg takes the end-of-image marker at its word and repeats the last colour.
        HostileFile("JPEG cut in its data and closed", lambda: cut[0.6] + b"\xff\xd9", 200),
        # PNG.
        HostileFile("PNG of 13000x13000", png_bomb, 413),
        HostileFile("PNG of 2^31-1 a side", lambda: png_of(2**31 - 1, 2**31 - 1, 8, 2, b""), 413),
        HostileFile("PNG of no width", lambda: png_of(0, 48, 8, 2, b""), 422),
        HostileFile("PNG of 1x1", lambda: png_of(1, 1, 8, 2, bytes(4)), 422),
        HostileFile("PNG of 1x50000", lambda: grey_png(width=1, height=50_000), 422),
        HostileFile("PNG of 50000x8", lambda: grey_png(width=50_000, height=8), 200),
        HostileFile("PNG larger than its data", lambda: png_of(900, 900, 8, 2, rows_of(48, 192)), 422),
        HostileFile("PNG smaller than its data", lambda: png_of(16, 16, 8, 2, rows_of(500, 48)), 200),
        HostileFile("PNG whose data is a bomb", lambda: png_of(16, 16, 8, 2, bytes(200 * 2**20)), 200),
        HostileFile("PNG of a depth that is none", lambda: png_of(64, 48, 7, 2, rows_of(48, 192)), 422),
        HostileFile("PNG of a colour type that is none", lambda: png_of(64, 48, 8, 5, rows_of(48, 192)), 422),
        HostileFile("PNG whose header comes second", lambda: good[:8] + text + good[8:], 422),
        HostileFile("PNG with a second header", lambda: grey_png(png_of(5000, 5000, 8, 2, b"")[8:33]), 422),
        HostileFile("PNG cut in its data", lambda: good[: len(good) // 2], 422),
        HostileFile("PNG with a wrong checksum", lambda: good[:60] + bytes([good[60] ^ 255]) + good[61:], 422),
        HostileFile("PNG with a chunk beyond its end", lambda: good[:33] + b"\x7f\xff\xff\xfftEXt" + good[33:], 422),
        HostileFile("PNG with a bomb in zTXt", lambda: grey_png(chunk(b"zTXt", b"Comment\0\0" + bomb())), 200),
        HostileFile("PNG with a bomb in iCCP", lambda: grey_png(chunk(b"iCCP", b"profile\0\0" + bomb())), 200),
        HostileFile("PNG with a bomb in iTXt", lambda: grey_png(chunk(b"iTXt", b"XML\0\1\0\0\0" + bomb())), 200),
        HostileFile(
            "PNG with text and EXIF",
            lambda: grey_png(
                text,
                chunk(b"zTXt", b"Patient\0\0" + packed),
                chunk(b"iTXt", b"Patient\0\0\0\0\0" + SECRET),
                chunk(b"eXIf", exif()[6:]),
            ),
            200,
        ),
        HostileFile("PNG with an executable behind it", lambda: good + b"MZ" + SECRET * 100, 200),
        HostileFile("animated PNG", animated_png, 200),
        HostileFile("animated PNG with a frame larger than itself", lambda: animated_png(30_000, 30_000), 422),
        HostileFile("PNG of 16 bits", lambda: png_of(64, 48, 16, 2, rows_of(48, 384)), 200),
        HostileFile("PNG of 1 bit", lambda: png_of(64, 48, 1, 0, rows_of(48, 8)), 200),
        HostileFile("grey PNG with alpha", lambda: png_of(64, 48, 8, 4, rows_of(48, 128)), 200),
        HostileFile("PNG with a palette and alpha", palette_png, 200),
        HostileFile("interlaced PNG", interlaced_png, 200),
        # WebP.
        HostileFile("WebP cut in its data", lambda: webp[: len(webp) // 2], 422),
        HostileFile("WebP whose canvas is larger than its picture", lambda: riff(canvas(900, 900), vp8()), 422),
        HostileFile("WebP whose canvas is smaller than its picture", lambda: riff(canvas(8, 8), vp8()), 422),
        HostileFile("WebP of 16384x16384", lambda: riff(canvas(16384, 16384), vp8()), 413),
        HostileFile("WebP with a canvas alone", lambda: riff(canvas(64, 48)), 422),
        HostileFile("lossless WebP", lambda: encode(".webp", cv2.IMWRITE_WEBP_QUALITY, 101), 200),
        HostileFile("animated WebP", animated_webp, 200),
        HostileFile("animated WebP with a frame larger than itself", lambda: animated_webp(16_000, 16_000), 200),
        HostileFile(
            "WebP with EXIF and XMP",
            lambda: riff(canvas(64, 48, 0x0C), vp8(), (b"EXIF", exif()[6:]), (b"XMP ", SECRET)),
            200,
        ),
        HostileFile("WebP with a file behind it", lambda: webp + SECRET * 100, 200),
    ]


def part(disposition: str | bytes, content: bytes, *headers: bytes) -> bytes:
    named = disposition if isinstance(disposition, bytes) else disposition.encode()
    lines = [b"--" + BOUNDARY, b"Content-Disposition: form-data; " + named, *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--" + BOUNDARY + b"--\r\n"


def image(name: str | bytes = 'filename="a.jpg"') -> bytes:
    named = name if isinstance(name, bytes) else name.encode()
    return part(b'name="image"; ' + named, jpeg(), b"Content-Type: image/jpeg")


def text_field(name: str, content: bytes) -> bytes:
    return part(f'name="{name}"', content)


def metadata(content: bytes | str) -> bytes:
    return form(image(), text_field("metadata", content if isinstance(content, bytes) else content.encode()))


def forms() -> list[HostileForm]:
    """Every request body, by what is wrong with it."""
    nested = b"--inner\r\nContent-Disposition: form-data; name=image\r\n\r\nx\r\n--inner--\r\n"
    good, secret = json.dumps({"age_approx": 60}).encode(), SECRET.decode()
    return [
        # File names: read by no one.
        HostileForm("two endings", lambda: form(image(f'filename="{secret}.jpg.exe"')), 200),
        HostileForm("path traversal", lambda: form(image(f'filename="../../../../tmp/{secret}.jpg"')), 200),
        HostileForm("absolute path", lambda: form(image(f'filename="/etc/{secret}"')), 200),
        HostileForm("Windows path", lambda: form(image(f'filename="C:\\\\{secret}\\\\CON"')), 200),
        HostileForm("NUL in the file name", lambda: form(image(f'filename="{secret}.php\0.jpg"')), 200),
        HostileForm("file name of 3000 characters", lambda: form(image(f'filename="{secret * 230}"')), 200),
        HostileForm("file name written backwards", lambda: form(image(f'filename="{secret}\u202egpj.exe"')), 200),
        HostileForm("file name that is no UTF-8", lambda: form(image(b'filename="\xff\xfe' + SECRET + b'"')), 200),
        HostileForm("header in the file name", lambda: form(image(b'filename="a\r\nX-Evil: 1\r\n\r\n"')), 415),
        HostileForm("encoded file name", lambda: form(image(f"filename*=utf-8''{secret}%0d%0aX-Evil:%201")), 422),
        HostileForm("command in the file name", lambda: form(image(f'filename="$(touch {secret});a|b`.jpg"')), 200),
        HostileForm("declared type that is false", lambda: form(image()).replace(b"image/jpeg", b"text/html"), 200),
        # The form around the file.
        HostileForm("no body", lambda: b"", 400),
        HostileForm("no content type", lambda: form(image()), 422, None),
        HostileForm("no boundary", lambda: form(image()), 400, "multipart/form-data"),
        HostileForm("empty boundary", lambda: form(image()), 400, "multipart/form-data; boundary="),
        HostileForm("boundary of 5000 characters", lambda: form(image()), 400, MULTIPART + "x" * 5000),
        HostileForm("another boundary", lambda: form(image()), 400, MULTIPART + "x"),
        HostileForm("no closing boundary", lambda: form(image(), text_field("metadata", good))[:-4], 400),
        HostileForm("cut in the metadata", lambda: form(image(), text_field("metadata", good))[:-30], 400),
        HostileForm("cut in the image", lambda: image()[:-500], 400),
        HostileForm("form in another character set", lambda: form(image()), 400, MULTIPART + "; charset=utf-7"),
        HostileForm("JSON", lambda: b'{"image": "a"}', 422, "application/json"),
        HostileForm("URL-encoded", lambda: b"image=a", 422, "application/x-www-form-urlencoded"),
        HostileForm("no file", lambda: form(text_field("metadata", good)), 422),
        HostileForm("image as text", lambda: form(text_field("image", b"text")), 422),
        HostileForm("image twice", lambda: form(image(), image()), 422),
        HostileForm("image as file and as text", lambda: form(image(), text_field("image", b"text")), 422),
        HostileForm("metadata twice", lambda: form(image(), *[text_field("metadata", good)] * 2), 422),
        HostileForm("metadata as a file", lambda: form(image(), part('name="metadata"; filename="a"', good)), 422),
        HostileForm(
            "form in a form",
            lambda: form(part('name="image"', nested, b"Content-Type: multipart/mixed; boundary=inner")),
            422,
        ),
        HostileForm("part without a name", lambda: form(part('filename="a.jpg"', jpeg())), 400),
        HostileForm("part without a disposition", lambda: form(b"--" + BOUNDARY + b"\r\n\r\nx\r\n"), 400),
        HostileForm("part with 10000 headers", lambda: form(part('name="image"', b"", *[b"X-A: b"] * 10_000)), 400),
        HostileForm("part with a header of 1 MB", lambda: form(part('name="image"', b"", b"X: " + b"a" * 2**20)), 400),
        HostileForm("1001 fields", lambda: form(image(), *[text_field(f"f{n}", b"") for n in range(1001)]), 400),
        HostileForm("1001 files", lambda: form(*[part(f'name="f{n}"; filename="a"', b"") for n in range(1001)]), 400),
        HostileForm(
            "field name that looks like another", lambda: form(image(), text_field("metad\u0430ta", good)), 422
        ),
        HostileForm("field name with control characters", lambda: form(image(), text_field("a\x0b\x85b", b"")), 422),
        HostileForm("field name of 10000 characters", lambda: form(image(), text_field("a" * 10_000, b"")), 400),
        # Text fields.
        HostileForm("metadata of over 1 MB", lambda: metadata(b'{"sex": "' + b"a" * 2**20 + b'"}'), 400),
        HostileForm("metadata of nearly 1 MB", lambda: metadata(b'{"sex": "' + b"a" * 1_000_000 + b'"}'), 422),
        HostileForm("metadata of 500000 brackets", lambda: metadata("[" * 500_000), 422),
        HostileForm("deep metadata", lambda: metadata('{"sex": ' * 100_000), 422),
        HostileForm("metadata with NaN", lambda: metadata('{"age_approx": NaN}'), 422),
        HostileForm("metadata with 1e999", lambda: metadata('{"age_approx": 1e999}'), 422),
        HostileForm("metadata with a number of 5000 digits", lambda: metadata(f'{{"age_approx": {"9" * 5000}}}'), 422),
        HostileForm("metadata with a key twice", lambda: metadata('{"age_approx": 20, "age_approx": 80}'), 422),
        HostileForm("metadata with NUL", lambda: metadata('{"sex": "a\\u0000b"}'), 422),
        HostileForm("metadata with half a character", lambda: metadata('{"sex": "\\ud83d"}'), 422),
        HostileForm("metadata that is no UTF-8", lambda: metadata(b'{"\xff\xfe": 1}'), 422),
        HostileForm("metadata with a byte order mark", lambda: metadata(b'\xef\xbb\xbf{"age_approx": 60}'), 422),
        HostileForm("metadata as UTF-16", lambda: metadata('{"age_approx": 60}'.encode("utf-16")), 422),
        HostileForm("device with a line break", lambda: form(image(), text_field("device", b"a\r\nX-Evil: 1")), 422),
        HostileForm("device of 256 characters", lambda: form(image(), text_field("device", b"a" * 256)), 422),
        HostileForm(
            "time with digits of another script",
            lambda: form(image(), text_field("acquired_at", ARABIC_DATE)),
            422,
        ),
        HostileForm("huge key", lambda: form(image()), 422, headers={"Idempotency-Key": "k" * 5000}),
    ]
