// Shapes shared by the C++ and the ISPC side. Plain macros: ISPC reads this file too.
#pragma once

// Query heads that share one KV head, at most.
#define NEO_MAX_GROUP 16
#define NEO_MAX_HEAD_DIM 256
// Query heads of one task, at most: bounds its memory on the stack.
#define NEO_MAX_TASK_Q_HEADS 64
// Tokens whose scores are held at once. A multiple of every block size, so a tile is whole blocks.
#define NEO_TILE_TOKENS 64
// Tokens of one task. Fixed, so that results depend on neither the batch nor the threads.
#define NEO_SEGMENT_TOKENS 512
