"""Triton's interpreter, in which the kernels run on a CPU, and what it wants mended."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    own = interpreter._patch_lang_tensor

    def patch(tensor, *scope):  # which older ones do not have
        """NumPy 2.4 makes no int of an array of one number, as which the interpreter keeps a loop's bounds."""
        own(tensor, *scope)
        put = scope[0].set_attr if scope else setattr
        put(tensor, "__index__", lambda number: number.handle.data.item())

    interpreter._patch_lang_tensor = patch
