/*
 * The flag protocol for Spin: two application processes, one mover, whoever switches; one table, two rows that are
 * inserted, updated and deleted. A drain waits for what was open when the flag changed. Written beside the model in
 * Python and not from it. `spin -a flags.pml && gcc -O2 -w -DSAFETY -DNOREDUCE -o pan pan.c && ./pan -m3000000` finds nothing; with
 * any of -DDROP_W1 … -DDROP_W7, -DSKIP_OLD_LIVE, -DSKIP_LIVE_OLD, -DLATE_DRAIN, -DSPLIT_MOVE, -DUNAWARE it finds a lost write.
 */
#define OLD  0
#define DUAL 1
#define LIVE 2
#define DONE 3
#define READS_NEW(s)  ((s) >= LIVE)
#define WRITES_OLD(s) ((s) != DONE)
#define WRITES_NEW(s) ((s) != OLD)
#define NOBODY 255

#ifndef ROWS
#define ROWS 2
#endif

byte flag = OLD;
bool drained = true, new_valid, old_valid = true;   /* the flag's row */
bool moved[ROWS];                                   /* the move's progress */
bool there[ROWS], old_fresh[ROWS], new_fresh[ROWS]; /* as committed */
byte holder[ROWS];                                  /* of the row's lock */
bool open[2], awaited[2], draining;

#define RIGHT(r, s) (!there[r] || (READS_NEW(s) && new_fresh[r]) || (!READS_NEW(s) && old_fresh[r]))

inline all_right() {
    r = 0;
    do :: r < ROWS -> assert(RIGHT(r, flag)); r++ :: else -> break od;
    r = 0
}

/* What a transaction has done to a row, not yet seen by others. */
#define UNTOUCHED 0
#define WRITTEN   1
#define DELETED   2

inline ended() {
    r = 0;
    do
    :: r < ROWS ->
        if :: holder[r] == me -> holder[r] = NOBODY :: else fi;
        did[r] = UNTOUCHED; r++
    :: else -> break
    od;
    r = 0; state = OLD; open[me] = false; awaited[me] = false
}

inline publish() {
    r = 0;
    do
    :: r < ROWS ->
        if
        :: did[r] == WRITTEN -> there[r] = true; old_fresh[r] = WRITES_OLD(state); new_fresh[r] = WRITES_NEW(state)
        :: did[r] == DELETED -> there[r] = false; old_fresh[r] = false; new_fresh[r] = false
        :: else
        fi;
        r++
    :: else -> break
    od;
    r = 0
}

proctype app(byte me) {
    byte state = OLD, r = 0, did[ROWS];
    do
    :: atomic { open[me] = true };                                  /* BEGIN */
       atomic {                                                     /* the flag rides on it */
#ifdef UNAWARE
           if :: me == 0 -> state = OLD :: else -> state = flag fi
#else
           state = flag
#endif
       };
       do
       :: atomic { did[0] == UNTOUCHED -> assert(RIGHT(0, state)) } /* read */
       :: atomic { holder[0] == NOBODY || holder[0] == me -> holder[0] = me; did[0] = WRITTEN }
       :: atomic { there[0] && (holder[0] == NOBODY || holder[0] == me) -> holder[0] = me; did[0] = DELETED }
#if ROWS > 1
       :: atomic { did[1] == UNTOUCHED -> assert(RIGHT(1, state)) }
       :: atomic { holder[1] == NOBODY || holder[1] == me -> holder[1] = me; did[1] = WRITTEN }
       :: atomic { there[1] && (holder[1] == NOBODY || holder[1] == me) -> holder[1] = me; did[1] = DELETED }
#endif
       :: atomic { true -> publish(); ended(); all_right(); break } /* COMMIT */
       :: atomic { true -> ended(); break }                         /* ROLLBACK, or a crash */
       od
    od
}

inline forget() {
#ifndef DROP_W7
    r = 0;
    do :: r < ROWS -> moved[r] = false; r++ :: else -> break od;
    r = 0
#else
    skip
#endif
}

inline flip(to) {
    flag = to; drained = false;
#ifndef LATE_DRAIN
    draining = false; awaited[0] = false; awaited[1] = false;
#endif
    all_right()
}

#ifdef DROP_W1
#define W1 true
#else
#define W1 drained
#endif
#ifdef DROP_W2
#define W2 true
#else
#define W2 new_valid
#endif
#ifdef DROP_W3
#define W3 true
#else
#define W3 drained
#endif
#ifdef DROP_W4
#define W4 true
#else
#define W4 drained
#endif
#ifdef DROP_W5
#define W5 true
#else
#define W5 drained
#endif
#ifdef DROP_W6
#define W6 true
#else
#define W6 old_valid
#endif

proctype switcher() {
    byte r = 0;
    do
    :: atomic { flag == OLD -> forget(); flip(DUAL) }
    :: atomic { flag == DUAL && W2 -> flip(LIVE) }
    :: atomic { flag == DUAL && W4 -> new_valid = false; forget(); flip(OLD) }
    :: atomic { flag == LIVE && W6 -> flip(DUAL) }
    :: atomic { flag == LIVE && W3 -> old_valid = false; flip(DONE) }
    :: atomic { flag == DONE -> forget(); flip(LIVE) }
#ifdef SKIP_OLD_LIVE
    :: atomic { flag == OLD -> flip(LIVE) }
#endif
#ifdef SKIP_LIVE_OLD
    :: atomic { flag == LIVE && old_valid -> new_valid = false; forget(); flip(OLD) }
#endif
    :: atomic { !drained && !draining -> draining = true; awaited[0] = open[0]; awaited[1] = open[1] }
    :: atomic { draining && !awaited[0] && !awaited[1] -> drained = true; draining = false }
    :: atomic { draining -> draining = false; awaited[0] = false; awaited[1] = false } /* crash: nothing recorded */
    od
}

/* One row a batch; the row's lock, its new value and the progress are one step, as they are one UPDATE and one commit. */
#define FREE(r) (holder[r] == NOBODY || !there[r])

proctype mover() {
    byte r = 0;
    bool took;
    do
#ifdef SPLIT_MOVE
    :: atomic { W1 && flag == DUAL && !new_valid && !moved[0] -> took = old_fresh[0] };
       atomic { holder[0] == NOBODY && flag == DUAL ->
                if :: there[0] -> new_fresh[0] = took && old_fresh[0] :: else fi; moved[0] = true; took = false }
#else
    :: atomic { W1 && flag == DUAL && !new_valid && !moved[0] && FREE(0) ->
                if :: there[0] -> new_fresh[0] = old_fresh[0] :: else fi; moved[0] = true }
#endif
    :: atomic { W5 && flag == LIVE && !old_valid && !moved[0] && FREE(0) ->
                if :: there[0] -> old_fresh[0] = new_fresh[0] :: else fi; moved[0] = true }
#if ROWS > 1
    :: atomic { W1 && flag == DUAL && !new_valid && !moved[1] && FREE(1) ->
                if :: there[1] -> new_fresh[1] = old_fresh[1] :: else fi; moved[1] = true }
    :: atomic { W5 && flag == LIVE && !old_valid && !moved[1] && FREE(1) ->
                if :: there[1] -> old_fresh[1] = new_fresh[1] :: else fi; moved[1] = true }
    :: atomic { W1 && flag == DUAL && !new_valid && moved[0] && moved[1] -> new_valid = true }
    :: atomic { W5 && flag == LIVE && !old_valid && moved[0] && moved[1] -> old_valid = true }
#else
    :: atomic { W1 && flag == DUAL && !new_valid && moved[0] -> new_valid = true }
    :: atomic { W5 && flag == LIVE && !old_valid && moved[0] -> old_valid = true }
#endif
    od
}

init {
    atomic {
        there[0] = true; old_fresh[0] = true; holder[0] = NOBODY;
#if ROWS > 1
        holder[1] = NOBODY; /* the second row is not there yet */
#endif
        run app(0); run app(1); run switcher(); run mover()
    }
}
