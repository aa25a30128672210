"""Bugs to plant in uploads of weights to a GPU."""

from __future__ import annotations

from catalogue import Mutant

UPLOAD = "backends/cupy/upload.py"
UPLOADING = "checkpoint/uploading.py"
BITS = "gpu/test_upload.py::test_every_bit_of_a_random_checkpoint"
REUSED = "gpu/test_upload.py::test_a_buffer_is_not_filled_before_it_was_copied"
LEFT = "gpu/test_upload.py::test_an_interrupt_leaves_nothing"

MUTANTS = [
    Mutant(
        "a staging buffer filled before it was copied",
        UPLOAD,
        "        self._copied.synchronize()\n",
        "",
        REUSED,
    ),
    Mutant(
        "a staging buffer not marked as being copied",
        UPLOAD,
        "        self._copied.record(stream)\n",
        "",
        REUSED,
    ),
    Mutant(
        "a second block copied over the first",
        UPLOAD,
        "                    target += count\n",
        "",
        BITS,
    ),
    Mutant(
        "parts of a block over each other",
        UPLOAD,
        "self._bytes[end - part.nbytes : end] = flat.view(np.uint8)",
        "self._bytes[: part.nbytes] = flat.view(np.uint8)",
        BITS,
    ),
    Mutant(
        "the last block of an array not uploaded",
        UPLOAD,
        "        size += part.nbytes\n    yield block\n",
        "        size += part.nbytes\n",
        BITS,
    ),
    Mutant(
        "uploads not waited for",
        UPLOAD,
        "            stream.synchronize()\n",
        "            pass\n",
        BITS,
    ),
    Mutant(
        "uploads into memory that is still in use",
        UPLOAD,
        "    stream.wait_event(cupy.cuda.get_current_stream().record())\n",
        "",
        "gpu/test_upload.py::test_earlier_work_comes_first",
    ),
    Mutant(
        "memory of a failed upload not given back",
        UPLOAD,
        "            cupy.get_default_memory_pool().free_all_blocks()\n",
        "",
        LEFT,
    ),
    Mutant(
        "memory of a failed upload held by the error",
        UPLOAD,
        "            traceback.clear_frames(error.__traceback__)",
        "            _ = error",
        LEFT,
    ),
    Mutant(
        "memory of an interrupted upload not given back",
        UPLOAD,
        "except BaseException as error:",
        "except Exception as error:",
        LEFT,
    ),
    Mutant(
        "heads that are read together taken for all heads",
        "checkpoint/opened.py",
        "deinterleave(array, (stop - start) // info.rows_at_once)",
        "deinterleave(array, 1)",
        BITS,
    ),
    Mutant(
        "layers that nobody asked for uploaded",
        "checkpoint/loading.py",
        "(name for name in checkpoint.tensors if not name.startswith(prefixes))",
        "(name for name in checkpoint.tensors if prefixes is not None)",
        "gpu/test_upload.py::test_layers_left_out_are_not_uploaded",
    ),
    Mutant(
        "files kept in memory that were uploaded",
        UPLOADING,
        "                checkpoint.forget(name)\n",
        "                pass\n",
        "gpu/test_upload.py::test_all_tensors_are_let_go",
    ),
    Mutant(
        "pages of files never let go",
        "checkpoint/opened.py",
        'if hasattr(mapped, "madvise"):',
        'if hasattr(view, "madvise"):',
        "gpu/test_upload.py::test_pages_of_the_file_are_let_go",
    ),
]
