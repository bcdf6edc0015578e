"""The warm process of the `python` tool: imports everything once, then forks for every call.

Standard input is the control socket (SEQPACKET). A request is one message with five descriptors:
    call    socket on which this call's messages go back; when the other side closes it, the call is killed
    source  memory file: u32 length, JSON header, images as raw RGB one after the other
    target  memory file for the answer: u32 length, JSON, the resulting image as raw RGB
    out     standard output
    err     standard error
Messages on `call`: b"started" and its process id from the child once its limits hold and before any of the model's code runs; then from
here b"done" with wait status, CPU microseconds, peak KiB and whether the kernel ran out of memory, or b"failed" with why.
What the child writes to `target` is untrusted, as the model's code has run in it; what is said here is not.
"""
import os
import sys


def serve():
    import json, socket
    global home
    control = socket.socket(fileno=os.dup(0))
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    home = None
    try:
        home = os.getcwd()
        said = warm_up()
    except BaseException as e:
        said = {"error": f"{type(e).__name__}: {e}"}
    try:
        control.send(json.dumps(said).encode())
    except OSError:  # varft went while everything was imported
        if home:
            shut_down({})
    if "error" in said:
        os._exit(1)
    loop(control)


def warm_up():
    """Imports what calls use, touches what loads late, and keeps the collector from copying shared pages."""
    global base, cv2, ctypes, errno, fcntl, gc, io, json, libc, linecache, mmap, np, pil, random, resource
    global select, signal, socket, struct, tempfile, traceback
    import ctypes, errno, fcntl, gc, io, json, linecache, mmap, random, resource, select, signal, socket, struct
    import tempfile, traceback
    import base64, collections, copy, functools, itertools, math, re, string, time, tokenize, zlib
    import numpy as np, numpy.fft, numpy.linalg, numpy.random
    import cv2
    import PIL.Image as pil, PIL.ImageChops, PIL.ImageDraw, PIL.ImageEnhance, PIL.ImageFilter, PIL.ImageOps, PIL.ImageStat
    import PIL.BmpImagePlugin, PIL.JpegImagePlugin, PIL.PngImagePlugin, PIL.PpmImagePlugin
    cv2.setNumThreads(1)
    tile = np.zeros((32, 32, 3), np.uint8)
    for kind in (".png", ".jpg", ".bmp"):
        cv2.imdecode(cv2.imencode(kind, cv2.GaussianBlur(cv2.resize(tile, (64, 64)), (3, 3), 0))[1], cv2.IMREAD_COLOR)
    pil.fromarray(tile).rotate(90).resize((8, 8)).convert("L")
    np.random.seed(0)
    traceback.format_exception(ValueError("x"))
    exec(compile("pass", "<code>", "exec"), {})
    libc = ctypes.CDLL(None, use_errno=True)
    try:  # the kernel, when short of memory, ends a call rather than varft
        with open("/proc/self/oom_score_adj", "w") as f:
            f.write("800")
    except OSError:
        pass
    libc.unshare(CLONE_NEWIPC)  # where that is allowed: System V memory that calls leave ends with this process
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # calls of the same user cannot trace or read this process
    gc.collect()
    gc.freeze()
    gc.disable()
    with open("/proc/self/statm") as f:
        base = int(f.read().split()[0]) * mmap.PAGESIZE
    return {"python": sys.version.split()[0], "numpy": np.__version__, "cv2": cv2.__version__, "pillow": PIL.__version__}


PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 38
CAP_DAC_READ_SEARCH = 2
CLONE_NEWIPC = 0x08000000


def out_of_memory_kills():
    try:
        with open("/proc/vmstat") as f:
            return next((int(line.split()[1]) for line in f if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0


def loop(control):
    calls = {}  # pid -> socket of its call
    owners = {}  # descriptor of that socket -> pid
    kills = out_of_memory_kills()
    me = os.getpid()
    wake, alarm = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(alarm, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(wake, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == control.fileno():
                message, fds, _, _ = socket.recv_fds(control, 16, 8)
                if not message:  # varft is gone
                    shut_down(calls)
                if len(fds) != 5:
                    for f in fds:
                        os.close(f)
                    continue
                call = socket.socket(fileno=fds[0])
                try:
                    pid = os.fork()
                except OSError as e:
                    tell(call, b"failed cannot fork: " + str(e).encode())
                    pid = None
                if pid == 0:
                    try:
                        child(me, call, *fds[1:])
                    except BaseException as e:  # before the code has begun: why, for the call's error
                        os.write(2, f"{type(e).__name__}: {e}".encode("utf-8", "backslashreplace"))
                    finally:
                        os._exit(1)
                for f in fds[1:]:
                    os.close(f)
                if pid is None:
                    call.close()
                    continue
                calls[pid] = call
                owners[call.fileno()] = pid
                poll.register(call, select.POLLIN)
            elif fd == wake:
                try:
                    os.read(wake, 4096)
                except BlockingIOError:
                    pass
            elif fd in owners:  # closed by the other side, or asked to stop
                poll.unregister(fd)
                os.kill(owners[fd], signal.SIGKILL)
        while calls:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            call = calls.pop(pid, None)
            if call is None:
                continue
            kill_group(pid)
            oom = 0
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                now = out_of_memory_kills()
                oom, kills = int(now > kills), now
            cpu = int((usage.ru_utime + usage.ru_stime) * 1e6)
            tell(call, b"done" + struct.pack("<iQQi", status, cpu, usage.ru_maxrss, oom))
            try:
                poll.unregister(call)
            except KeyError:
                pass
            del owners[call.fileno()]
            call.close()


def tell(call, message):
    try:
        call.send(message, socket.MSG_DONTWAIT)
    except OSError:  # nobody waits for it any more
        pass


def kill_group(pid):
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass


def shut_down(calls):
    for pid in calls:
        os.kill(pid, signal.SIGKILL)
        kill_group(pid)
    for pid in calls:
        os.waitpid(pid, 0)
    import shutil
    os.chdir("/")
    shutil.rmtree(home, ignore_errors=True)
    try:
        os.rmdir(os.path.dirname(home))  # the last one out
    except OSError:
        pass
    os._exit(0)


def child(zygote, call, source, target, out, err):
    source, target, out, err, call = (fcntl.fcntl(f, fcntl.F_DUPFD, 16) for f in (source, target, out, err, call.fileno()))
    for fd, to in ((out, 1), (err, 2), (source, 3), (target, 4), (call, 5)):
        os.dup2(fd, to)
    os.closerange(6, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    size = os.fstat(3).st_size
    data = mmap.mmap(3, size, access=mmap.ACCESS_READ)
    length = struct.unpack_from("<I", data)[0]
    request = json.loads(data[4:4 + length])
    confine(zygote, request)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8", "backslashreplace", line_buffering=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace", line_buffering=True)
    seed = request["seed"]
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    cv2.setRNGSeed(seed & 0x7FFFFFFF)
    names = prepare(request, data, 4 + length)
    file, room = request["limits"]["file"], max(request["limits"]["file"], request["limits"]["image"] + (1 << 20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file, room))
    os.write(5, b"started" + struct.pack("<i", os.getpid()))
    os.close(5)
    outcome, detail, picture = run(request, names)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))  # the answer is a file too, with a limit of its own
    try:
        answer(outcome, detail, picture)
    except MemoryError:
        answer("memory_limit", "", None)
    os._exit(0)


def confine(zygote, request):
    """Everything that limits the call; from here on the process can only lose rights."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.umask(0o077)
    os.chdir(request["scratch"])
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.geteuid() == 0:
        drop_root()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # after the change of user, which resets it
    if os.getppid() != zygote:
        os._exit(1)
    limits = request["limits"]
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, limits["cpu"], limits["cpu"] + 1),  # far above the limit, for when nobody watches
        (resource.RLIMIT_AS, base + limits["memory"], base + limits["memory"]),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_NPROC, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))
    os.environ.clear()
    tempfile.tempdir = os.getcwd()


def drop_root():
    """As root, a call gets a user of its own, so that it cannot signal or trace anything and the limit on processes holds
    (it does not for root). Only the right to read files stays, as Python's own modules may lie in root's home."""
    own = (1 << 30) + os.getpid()
    try:
        os.chown(".", own, own)
        libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setgroups([])
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)
    except OSError:  # a container whose root may not change users: its root is an ordinary user outside
        pass
    keep = 1 << CAP_DAC_READ_SEARCH
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(keep, keep, 0, 0, 0, 0))


def prepare(request, data, at):
    """The names that the code finds defined, and the images as files."""
    images, paths = [], []
    for i, (width, height) in enumerate(request["images"]):
        size = width * height * 3
        path = f"image_{i + 1}.ppm"
        with open(path, "wb", buffering=0) as f:
            f.write(b"P6 %d %d 255\n" % (width, height))
            f.write(memoryview(data)[at:at + size])
        rgb = np.frombuffer(data, np.uint8, size, at).reshape(height, width, 3)
        images.append(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
        paths.append(path)
        at += size
    names = {"__name__": "__main__", "__builtins__": __builtins__, "np": np, "cv2": cv2, "Image": pil}
    if images:
        names.update(image=images[-1], images=images, image_path=paths[-1], image_paths=paths, original=rgb)
    return names


def run(request, names):
    """Runs the code: outcome, detail, and the image it made (RGB) or None."""
    original = names.pop("original", None)
    saved = hook_files(names.get("image_path"))
    code = request["code"]
    linecache.cache["<code>"] = (len(code), None, code.splitlines(True), "<code>")
    import time
    time.sleep = lambda seconds: None  # waiting helps nothing here, and only processor time is limited
    try:
        try:
            exec(compile(code, "<code>", "exec"), names)
        except SystemExit as e:
            if e.code not in (None, 0):
                return "program_error", f"SystemExit: {e.code}", None
        sys.stdout.flush()
        sys.stderr.flush()
        picture = saved[-1] if saved else next((names[n] for n in ("result", "image") if is_image(names.get(n))), None)
        if picture is None:
            return "ok", "", None
        picture = as_rgb(picture)
        if picture.nbytes > request["limits"]["image"]:
            return "output_limit", "", None
        if not saved and original is not None and np.array_equal(picture, original):
            picture = None  # nothing was done to it
        return "ok", "", picture
    except MemoryError:
        return "memory_limit", "", None
    except BaseException as e:
        if isinstance(e, cv2.error) and getattr(e, "code", 0) == -4:
            return "memory_limit", "", None
        if isinstance(e, OSError) and e.errno == errno.EFBIG:
            return "file_size_limit", "", None
        return "program_error", describe(e), None


def is_image(value):
    return isinstance(value, pil.Image) or isinstance(value, np.ndarray) and value.ndim in (2, 3)


def describe(error):
    """The traceback as the author of the code knows it: without the frames of this file."""
    try:
        frame = error.__traceback__
        while frame is not None and frame.tb_frame.f_code.co_filename != "<code>":
            frame = frame.tb_next
        text = "".join(traceback.format_exception(type(error), error, frame, limit=-6))
    except BaseException as e:
        text = f"{type(error).__name__} (its text cannot be shown: {type(e).__name__})"
    return text if len(text) <= 4000 else text[:1000] + "\n...\n" + text[-3000:]


def hook_files(image_path):
    """Makes the usual way of writing such code work: it reads and saves images under paths of its own invention.
    A path that does not exist reads as the image being worked on; one outside the scratch folder is written inside it.
    Images written by OpenCV are kept as they are (no loss from JPEG) and go to disk uncompressed."""
    saved = []
    here = os.getcwd()
    imread, imwrite, imencode, opened, save = cv2.imread, cv2.imwrite, cv2.imencode, pil.open, pil.Image.save

    def place(name):
        name = os.fspath(name)
        folder = os.path.realpath(os.path.dirname(name) or ".")
        inside = (folder + "/").startswith(here + "/") and os.path.isdir(folder)
        return name if inside else os.path.basename(name)

    def find(name):
        if not isinstance(name, (str, os.PathLike)) or image_path is None or os.path.exists(name):
            return name
        near = place(name)
        return near if near and os.path.exists(near) else image_path

    def read(filename, *args, **kwargs):
        return imread(find(filename), *args, **kwargs)

    def write(filename, img, *args, **kwargs):
        filename = place(filename)
        plain = isinstance(img, np.ndarray) and img.dtype == np.uint8 and (img.ndim == 2 or img.ndim == 3 and img.shape[2] in (1, 3, 4))
        if not plain or img.size == 0 or not cv2.haveImageWriter(filename):
            done = imwrite(filename, img, *args, **kwargs)  # with OpenCV's own errors
            if done:
                saved[:] = [np.array(img)]
            return done
        saved[:] = [img.copy()]
        with open(filename, "wb") as f:
            f.write(imencode(".bmp", img)[1])
        return True

    def open_image(fp, *args, **kwargs):
        return opened(find(fp), *args, **kwargs)

    def save_image(self, fp, *args, **kwargs):
        if isinstance(fp, (str, os.PathLike)):
            fp = place(fp)
            save(self, fp, *args, **kwargs)
            saved[:] = [self.copy()]
        else:
            save(self, fp, *args, **kwargs)

    cv2.imread, cv2.imwrite, pil.open, pil.Image.save = read, write, open_image, save_image
    return saved


def as_rgb(picture):
    """What OpenCV or Pillow would show, as 8-bit RGB; arrays are taken for BGR, as OpenCV has them."""
    if isinstance(picture, pil.Image):
        picture = np.asarray(picture.convert("RGB"))
        if picture.size == 0:
            raise ValueError(f"the resulting image is empty: {picture.shape}")
        return np.ascontiguousarray(picture)
    picture = np.asarray(picture)
    if picture.ndim == 3 and picture.shape[2] == 1:
        picture = picture[:, :, 0]
    if not (picture.ndim == 2 or picture.ndim == 3 and picture.shape[2] in (3, 4)):
        raise ValueError(f"the resulting image has shape {picture.shape}; height x width, or height x width x 3, is needed")
    if picture.size == 0:
        raise ValueError(f"the resulting image is empty: {picture.shape}")
    if picture.dtype == np.bool_:
        picture = picture.astype(np.uint8) * 255
    elif picture.dtype != np.uint8:
        picture = np.clip(np.rint(np.nan_to_num(picture)), 0, 255).astype(np.uint8)
    picture = np.ascontiguousarray(picture)
    if picture.ndim == 2:
        return cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB if picture.shape[2] == 3 else cv2.COLOR_BGRA2RGB)


def answer(outcome, detail, picture):
    # Half a surrogate pair is no text elsewhere.
    head = {"outcome": outcome, "detail": detail.encode("utf-8", "backslashreplace").decode()}
    if picture is not None:
        head["size"] = [picture.shape[1], picture.shape[0]]
    head = json.dumps(head).encode()
    parts = [struct.pack("<I", len(head)) + head]
    if picture is not None:
        parts.append(picture.reshape(-1).data)
    at = 0
    for part in parts:
        while len(part):
            n = os.pwrite(4, part, at)
            at += n
            part = part[n:]


serve()
