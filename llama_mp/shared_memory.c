/* Sums and gathers over the ranks of one machine, through memory that all of them have mapped.
 *
 * A rank copies its part into a slot of its own, says that it has arrived, and goes on when all have. Slots are used
 * in turn, two of them: who writes the next has been told by everybody's arrival that nobody reads it any more.
 * Waiting is a short spin, then giving way to other processes, then sleep until the other wakes us: ranks may
 * outnumber cores. Compiled without -fassociative-math: the order of summation is fixed. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "vectors.h"

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() ((void)0)
#endif

enum { LINE = 64, BLOCK = 1024 /* elements combined at once, in the first-level cache */ };
enum { YIELDS = 50, SLEEP_NS = 20000000 /* between looks at whether the other still lives */ };
enum { TWO_STEP_BYTES = 1 << 15 };
enum { FLOAT32, BFLOAT16, FLOAT16 }; /* KINDS in shared_memory.py */
enum { SUM, MAX };                   /* OPERATIONS there */

/* One cache line a rank, so that arrivals do not slow each other down. */
typedef struct {
    _Alignas(LINE) atomic_uint arrived; /* at how many barriers so far: a futex */
    atomic_uint sleepers;               /* who wait in it */
} member;

/* What a process knows of the region: `size` members, then for each of two turns one slot a rank and one result. */
typedef struct {
    char *region;
    long rank, size, slot_bytes, spins;
    unsigned barriers, turn;
    int file; /* of the region: a rank holds a lock on the byte of its number as long as it lives */
    double timeout_s;
} group;

/* A file in memory without a name, closed on exec; minus the error's number where there is none. */
int new_file(void) {
    long file = syscall(SYS_memfd_create, "llama-mp", 1u /* MFD_CLOEXEC, which old headers lack */);
    return file < 0 ? -errno : (int)file;
}

static member *member_of(const group *g, long rank) { return (member *)g->region + rank; }

static char *slot_of(const group *g, long rank) { /* rank == size: the result */
    return g->region + g->size * sizeof(member) + ((g->turn & 1) * (g->size + 1) + rank) * g->slot_bytes;
}

/* ---- waiting ---------------------------------------------------------------------------------------------------- */

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int is_gone(const group *g, long rank) {
    struct flock probe = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = rank, .l_len = 1};
    return fcntl(g->file, F_GETLK, &probe) == 0 && probe.l_type == F_UNLCK;
}

static int has_arrived(const group *g, const member *m) {
    return (int)(atomic_load(&m->arrived) - g->barriers) >= 0; /* the counts may wrap around */
}

/* 0, or what kept a rank from arriving: its number + 1 when it is late, minus that when its process is gone. */
static long sleep_for(const group *g, long rank) {
    member *m = member_of(g, rank);
    double begun = now_s();
    for (;;) {
        int gone = is_gone(g, rank); /* before the look at its arrival: it may have arrived, and ended since */
        unsigned seen = atomic_load(&m->arrived);
        if (has_arrived(g, m)) return 0;
        if (gone) return -(rank + 1);
        if (now_s() - begun > g->timeout_s) return rank + 1;
        struct timespec most = {0, SLEEP_NS};
        atomic_fetch_add(&m->sleepers, 1);
        syscall(SYS_futex, &m->arrived, FUTEX_WAIT, seen, &most, NULL, 0); /* returns at once if it has changed */
        atomic_fetch_sub(&m->sleepers, 1);
    }
}

static long wait_for(const group *g, long rank) {
    const member *m = member_of(g, rank);
    for (long spin = 0; spin < g->spins; spin++) {
        if (has_arrived(g, m)) return 0;
        PAUSE();
    }
    for (long yield = 0; yield < YIELDS; yield++) {
        if (has_arrived(g, m)) return 0;
        sched_yield();
    }
    return sleep_for(g, rank);
}

static long arrive_and_wait(group *g) {
    member *own = member_of(g, g->rank);
    atomic_store(&own->arrived, ++g->barriers);
    if (atomic_load(&own->sleepers)) syscall(SYS_futex, &own->arrived, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    for (long rank = 0; rank < g->size; rank++) {
        long missing = wait_for(g, rank);
        if (missing) return missing;
    }
    return 0;
}

/* ---- numbers ---------------------------------------------------------------------------------------------------- */

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float from_fp16(uint16_t half) {
    uint32_t moved = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t bits = as_bits(as_float(moved) * 0x1p112f); /* the difference of the exponents' biases; subnormal too */
    return as_float(sign | bits | (moved >= 0x0f800000 ? 0x7f800000 : 0)); /* infinity and NaN */
}

INLINE uint16_t to_fp16(float value) {
    uint32_t bits = as_bits(value), size = bits & 0x7fffffff;
    uint32_t normal = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13; /* to nearest, ties to even; may overflow */
    uint32_t subnormal = as_bits(as_float(size) + 0.5f) - 0x3f000000;      /* the addition rounds to 2^-24 */
    uint32_t large = size > 0x7f800000 ? 0x7e00 : 0x7c00;                  /* NaN, infinity */
    uint32_t half = size >= 0x47800000 ? large : size < 0x38800000 ? subnormal : normal;
    return (uint16_t)((bits >> 16 & 0x8000) | half);
}

INLINE void widen(const char *slot, long kind, long start, long count, float *to) {
    if (kind == FLOAT32) {
        memcpy(to, (const float *)slot + start, count * sizeof *to);
        return;
    }
    const uint16_t *from = (const uint16_t *)slot + start;
    if (kind == BFLOAT16)
        for (long i = 0; i < count; i++) to[i] = from_bf16(from[i]);
    else
        for (long i = 0; i < count; i++) to[i] = from_fp16(from[i]);
}

INLINE void narrow(const float *from, long kind, long start, long count, char *target) {
    if (kind == FLOAT16)
        for (long i = 0; i < count; i++) ((uint16_t *)target)[start + i] = to_fp16(from[i]);
    else
        store(kind == BFLOAT16, from, target + start * (kind == BFLOAT16 ? 2 : 4), count);
}

/* target = the sum or the maximum of all slots over elements first .. last, in the order of the ranks, in fp32. */
static void combine(const group *g, long kind, long operation, long first, long last, char *target) {
    float total[BLOCK], widened[BLOCK];
    for (long start = first; start < last; start += BLOCK) {
        long count = last - start < BLOCK ? last - start : BLOCK;
        widen(slot_of(g, 0), kind, start, count, total);
        for (long rank = 1; rank < g->size; rank++) {
            const float *part = (const float *)slot_of(g, rank) + start;
            if (kind != FLOAT32) widen(slot_of(g, rank), kind, start, count, widened), part = widened;
            if (operation == SUM)
                for (long i = 0; i < count; i++) total[i] += part[i];
            else /* NaN is the largest */
                for (long i = 0; i < count; i++) total[i] = part[i] > total[i] || part[i] != part[i] ? part[i] : total[i];
        }
        narrow(total, kind, start, count, target);
    }
}

/* ---- collectives: each returns what wait_for does --------------------------------------------------------------- */

/* `data` becomes the sum, or the maximum, over the ranks. */
long all_reduce(group *g, char *data, long count, long kind, long operation) {
    long element_bytes = kind == FLOAT32 ? 4 : 2, slot_elements = g->slot_bytes / element_bytes;
    for (; count > 0; count -= slot_elements, data += slot_elements * element_bytes, g->turn++) {
        long some = count < slot_elements ? count : slot_elements;
        memcpy(slot_of(g, g->rank), data, some * element_bytes);
        long missing = arrive_and_wait(g);
        if (missing) return missing;
        if (g->size == 2 || some * element_bytes < TWO_STEP_BYTES) {
            combine(g, kind, operation, 0, some, data);
            continue;
        }
        /* Each rank combines a share, and all take the whole of it: the order of summation is the same. */
        char *result = slot_of(g, g->size);
        combine(g, kind, operation, some * g->rank / g->size, some * (g->rank + 1) / g->size, result);
        missing = arrive_and_wait(g);
        if (missing) return missing;
        memcpy(data, result, some * element_bytes);
    }
    return 0;
}

/* Rank `root` gets each rank's `num_bytes` of `data` in `targets`, which only it has. Each may name itself: then all get
 * them. */
long gather(group *g, const char *data, long num_bytes, char **targets, long root) {
    for (long done = 0; done < num_bytes; done += g->slot_bytes, g->turn++) {
        long some = num_bytes - done < g->slot_bytes ? num_bytes - done : g->slot_bytes;
        memcpy(slot_of(g, g->rank), data + done, some);
        long missing = arrive_and_wait(g);
        if (missing) return missing;
        for (long rank = 0; g->rank == root && rank < g->size; rank++)
            memcpy(targets[rank] + done, slot_of(g, rank), some);
    }
    return 0;
}
