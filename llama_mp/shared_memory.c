/* Sums and gathers over the ranks of one machine, through memory that all of them have mapped.
 *
 * A rank copies its part into a slot of its own, says that it has arrived, and goes on when all have. Slots are used
 * in turn, two of them: who writes the next has been told by everybody's arrival that nobody reads it any more.
 * Waiting is a short spin, then giving way to other processes, then sleeping a little: ranks may outnumber cores. */

#define _GNU_SOURCE
#pragma GCC optimize("no-associative-math") /* the order of summation is fixed */
#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#define EACH_INSTRUCTION_SET __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define PAUSE() __builtin_ia32_pause()
#else
#define EACH_INSTRUCTION_SET
#define PAUSE() ((void)0)
#endif

enum { LINE = 64, SPINS = 2000, YIELDS = 2000, SLEEP_NS = 50000, TWO_STEP_BYTES = 1 << 15 };
enum { FLOAT32, BFLOAT16 };

/* One cache line a rank, so that arrivals do not slow each other down. */
typedef struct {
    _Alignas(LINE) atomic_ulong arrived;
    long pid;
} member;

/* What a process knows of the region: `members` lines, then for each of two turns one slot a rank and one result. */
typedef struct {
    char *region;
    long rank, size, slot_bytes;
    unsigned long barriers, turn;
    double timeout_s;
} group;

static member *member_of(const group *g, long rank) { return (member *)g->region + rank; }

static char *slot_of(const group *g, long rank) { /* rank == size: the result */
    return g->region + g->size * sizeof(member) + ((g->turn & 1) * (g->size + 1) + rank) * g->slot_bytes;
}

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* Whether a process has ended; one that its parent has not waited for yet is a line in the table, and no more. */
static int is_gone(long pid) {
    char path[64], text[256] = "";
    snprintf(path, sizeof path, "/proc/%ld/stat", pid);
    FILE *file = fopen(path, "r");
    if (!file) return errno == ENOENT;
    size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = 0;
    const char *state = strrchr(text, ')'); /* the name before it may hold anything */
    return state && (state[2] == 'Z' || state[2] == 'X');
}

/* 0, or what kept a rank from arriving: its number + 1 when it is late, minus that when its process is gone. */
static long wait_for(const group *g, long rank) {
    member *m = member_of(g, rank);
    double begun = 0;
    for (unsigned long tries = 0; atomic_load_explicit(&m->arrived, memory_order_acquire) < g->barriers; tries++) {
        if (tries < SPINS) {
            PAUSE();
        } else if (tries < SPINS + YIELDS) {
            sched_yield();
        } else {
            struct timespec pause = {0, SLEEP_NS};
            nanosleep(&pause, NULL);
            if (!begun) begun = now_s();
            if (tries % 256 == 0) {
                if (is_gone(m->pid)) return -(rank + 1);
                if (now_s() - begun > g->timeout_s) return rank + 1;
            }
        }
    }
    return 0;
}

static long arrive_and_wait(group *g) {
    g->barriers++;
    atomic_store_explicit(&member_of(g, g->rank)->arrived, g->barriers, memory_order_release);
    for (long rank = 0; rank < g->size; rank++) {
        long missing = wait_for(g, rank);
        if (missing) return missing;
    }
    return 0;
}

static inline float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to nearest, ties to even */
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded); /* NaN stays NaN */
}

enum { BLOCK = 1024 }; /* elements summed at once, in the first-level cache */

/* target = the sum of all slots over elements first .. last, in the order of the ranks, in fp32. */
EACH_INSTRUCTION_SET
static void sum_slots(const group *g, long kind, long first, long last, char *target) {
    float sums[BLOCK];
    for (long start = first; start < last; start += BLOCK) {
        long count = last - start < BLOCK ? last - start : BLOCK;
        for (long rank = 0; rank < g->size; rank++) {
            if (kind == FLOAT32) {
                const float *from = (const float *)slot_of(g, rank) + start;
                for (long i = 0; i < count; i++) sums[i] = rank ? sums[i] + from[i] : from[i];
            } else {
                const uint16_t *from = (const uint16_t *)slot_of(g, rank) + start;
                for (long i = 0; i < count; i++) sums[i] = (rank ? sums[i] : 0) + from_bf16(from[i]);
            }
        }
        if (kind == FLOAT32) {
            memcpy((float *)target + start, sums, count * sizeof(float));
        } else {
            uint16_t *to = (uint16_t *)target + start;
            for (long i = 0; i < count; i++) to[i] = to_bf16(sums[i]);
        }
    }
}

/* `data` becomes the sum over the ranks. Returns what arrive_and_wait does. */
long all_reduce(group *g, char *data, long count, long kind) {
    long element_bytes = kind == FLOAT32 ? 4 : 2, slot_elements = g->slot_bytes / element_bytes;
    for (; count > 0; count -= slot_elements, data += slot_elements * element_bytes, g->turn++) {
        long some = count < slot_elements ? count : slot_elements;
        memcpy(slot_of(g, g->rank), data, some * element_bytes);
        long missing = arrive_and_wait(g);
        if (missing) return missing;
        if (g->size == 2 || some * element_bytes < TWO_STEP_BYTES) {
            sum_slots(g, kind, 0, some, data);
            continue;
        }
        /* Each rank sums a share, and all take the whole of it: the order of summation is the same. */
        char *result = slot_of(g, g->size);
        sum_slots(g, kind, some * g->rank / g->size, some * (g->rank + 1) / g->size, result);
        missing = arrive_and_wait(g);
        if (missing) return missing;
        memcpy(data, result, some * element_bytes);
    }
    return 0;
}

/* Rank `root` gets each rank's `num_bytes` of `data`, one after the other in `target`. */
long gather(group *g, const char *data, long num_bytes, char *target, long root) {
    for (long done = 0; done < num_bytes; done += g->slot_bytes, g->turn++) {
        long some = num_bytes - done < g->slot_bytes ? num_bytes - done : g->slot_bytes;
        memcpy(slot_of(g, g->rank), data + done, some);
        long missing = arrive_and_wait(g);
        if (missing) return missing;
        for (long rank = 0; g->rank == root && rank < g->size; rank++)
            memcpy(target + rank * num_bytes + done, slot_of(g, rank), some);
    }
    return 0;
}
