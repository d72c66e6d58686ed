"""Where the operands of a tile lie, and the steps on one block of the hidden width that all kernels share.

Every kernel walks the last matrix of the memory, `[HIDDEN, WIDTH]`, in blocks of its rows. A hidden block brings its
own input rows of that matrix: activations of the first layer (depth 2), or columns of the keys (depth 1, where the
hidden width is the key width). The matrices of one batch row and head are packed in one buffer: memory offsets first
to last, then momenta first to last.
"""

import triton
import triton.language as tl


# Scratch of one tile is a row of planes, so that their distances are constants and one address serves all of them.
# Planes `[BLOCK, HIDDEN]` in the dtype of q, at depth 2 (a forward has the first three):
X = tl.constexpr(0)  # features of the keys
U = tl.constexpr(1)  # directions of the first layer
SLOPE = tl.constexpr(2)  # slopes at the keys' first pre-activations
BEND = tl.constexpr(3)  # curvatures there, times what comes back through the last matrix
Y = tl.constexpr(4)  # features of the queries
R = tl.constexpr(5)  # slopes at the queries' first pre-activations, then the gradients of these
COT_U = tl.constexpr(6)  # gradients of U, then of what the slopes make U of
COT_X = tl.constexpr(7)  # gradients of X, then of the keys' first pre-activations; at depth 1 of the keys, and alone
# Planes `[BLOCK, WIDTH]` in the dtype of q (a forward has the first one):
U_LAST = tl.constexpr(0)  # directions of the last layer
COT_R = tl.constexpr(1)  # gradients of the read's last pre-activations
COT_Z = tl.constexpr(2)  # gradients of the write's last pre-activations
# Planes `[BLOCK, WIDTH]` in float32 (backward only):
Z = tl.constexpr(0)  # the write's last pre-activations
READ = tl.constexpr(1)  # the read's
COT_U_LAST = tl.constexpr(2)  # gradients of U_LAST
COT_K = tl.constexpr(3)  # gradients of the keys, from the read


@triton.jit
def hidden_rows(
    wide, name: tl.constexpr, j,
    DEPTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Addresses of columns j.. of a hidden plane, and which of them exist."""
    t, h = tl.arange(0, BLOCK)[:, None], j + tl.arange(0, BLOCK_J)[None, :]
    return wide + (t * HIDDEN + h) + (name * BLOCK * HIDDEN if DEPTH > 1 else 0), (t < BLOCK) & (h < HIDDEN)


@triton.jit
def width_rows(narrow, name: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Addresses of a plane as wide as a token, and which of them exist."""
    t, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    return narrow + (t * WIDTH + d) + name * BLOCK * WIDTH, (t < BLOCK) & (d < WIDTH)


@triton.jit
def scratch_of(
    index, wide, narrow,
    DEPTH: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Planes of one tile in the dtype of q; KEEP: of a backward."""
    PLANES: tl.constexpr = (8 if KEEP else 3) if DEPTH > 1 else 1
    return wide + index * PLANES * BLOCK * HIDDEN, narrow + index * (3 if KEEP else 1) * BLOCK * WIDTH


@triton.jit
def token_rows(program, tile, num_tokens, H, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of a tile's rows in slots `[B, S, H, WIDTH]`, and which of them exist."""
    t = tl.arange(0, BLOCK)
    slot = tile * TILE + t
    at = ((program // H * num_tokens + slot) * H + program % H) * WIDTH
    return at[:, None], ((t < TILE) & (slot < num_tokens))[:, None]


@triton.jit
def first_block(
    matrix, j, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr
):  # fmt: skip
    """Addresses of columns j.. of a first matrix `[WIDTH, HIDDEN]`, and which of them exist."""
    d, h = tl.arange(0, BLOCK_D)[:, None], j + tl.arange(0, BLOCK_J)[None, :]
    return matrix + (d * HIDDEN + h), (d < WIDTH) & (h < HIDDEN)


@triton.jit
def last_block(
    matrix, j, DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The same for rows j.. of the last matrix `[HIDDEN, WIDTH]`, behind the first one if there is one."""
    h, d = j + tl.arange(0, BLOCK_J)[:, None], tl.arange(0, BLOCK_D)[None, :]
    return matrix + (h * WIDTH + d) + (DEPTH - 1) * WIDTH * HIDDEN, (h < HIDDEN) & (d < WIDTH)


@triton.jit
def column_block(pointer, at, valid, j, HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr):
    """Columns j.. of token rows."""
    h = j + tl.arange(0, BLOCK_J)[None, :]
    return tl.load(pointer + at + h, mask=valid & (h < HIDDEN), other=0.0)


@triton.jit
def load_tokens(pointer, at, valid, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Whole token rows."""
    d = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(pointer + at + d, mask=valid & (d < WIDTH), other=0.0)


@triton.jit
def store_tokens(pointer, at, valid, x, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(pointer + at + d, x.to(pointer.dtype.element_ty), mask=valid & (d < WIDTH))


@triton.jit
def square(BLOCK: tl.constexpr):
    t = tl.arange(0, BLOCK)
    return t[:, None] * BLOCK + t[None, :]


@triton.jit
def load(at, mask):
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def load_float(at, mask):
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_norm(weight, bias, head, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, HAS_NORM: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    if not HAS_NORM:
        return tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    at = head * WIDTH + d
    return tl.load(weight + at, mask=d < WIDTH, other=0.0), tl.load(bias + at, mask=d < WIDTH, other=0.0)


@triton.jit
def load_first(
    state, base, j, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr,
    HAS_BASE: tl.constexpr,
):  # fmt: skip
    """Columns j.. of the first matrix of a memory: base and offset."""
    at, mask = first_block(state, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    m = load(at, mask)
    if HAS_BASE:
        at, mask = first_block(base, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        m += load(at, mask)
    return m


@triton.jit
def load_last(
    state, base, j, DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, HAS_BASE: tl.constexpr,
):  # fmt: skip
    """Rows j.. of its last one."""
    at, mask = last_block(state, j, DEPTH, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    m = load(at, mask)
    if HAS_BASE:
        at, mask = last_block(base, j, DEPTH, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        m += load(at, mask)
    return m


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def row_coefficients(rows, BLOCK: tl.constexpr):
    """Two neighbouring rows of coefficients, `[BLOCK, 1]` each: β and f, or the weights of a token's writes."""
    t = tl.arange(0, BLOCK)[:, None]
    return tl.load(rows + t), tl.load(rows + BLOCK + t)
