/* Faults on purpose: what the sanitizers must find before their silence about the core means anything. */

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static int shared;
static void *volatile lost;

void leak(void) { lost = malloc(4321); lost = NULL; }

int overflow(void) {
    volatile char *block = malloc(8);
    int value = block[8];
    free((void *) block);
    return value;
}

int undefined(int value) { return 2147483647 + value; }

static void *count(void *unused) {
    for (int i = 0; i < 1000; i++) shared++;
    return unused;
}

int race(void) {
    pthread_t first, second;
    pthread_create(&first, NULL, count, NULL);
    pthread_create(&second, NULL, count, NULL);
    pthread_join(first, NULL);
    pthread_join(second, NULL);
    return shared;
}
