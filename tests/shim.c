/* Stands where NVIDIA's Python bindings look for libnvinfer, libnvinfer_plugin and libnvonnxparser.
 *
 * The nine C functions that the bindings take from there are forwarded to the libraries of TensorRT for RTX that
 * SHIM_INFER and SHIM_PARSER name. Those answer no other version than their own, so it is put in place of the one that
 * was asked for. Where no library is named, every function answers NULL or 0: enough for the bindings to be imported.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

typedef int (*number)(void);
typedef void *(*pointer)(void);
typedef void *(*by_code)(int);
typedef void *(*made_of_one)(void *, int);
typedef void *(*made_of_two)(void *, void *, int);

static void *found(const char *name, int parser) {
  static void *handles[2];
  const char *path = getenv(parser ? "SHIM_PARSER" : "SHIM_INFER");
  if (path == NULL || path[0] == '\0') return NULL;
  if (handles[parser] == NULL) handles[parser] = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (handles[parser] == NULL) {
    fprintf(stderr, "shim: %s\n", dlerror());
    return NULL;
  }
  return dlsym(handles[parser], name);
}

static int version(void) {
  number call = (number)found("getInferLibVersion", 0);
  return call ? call() : 0;
}

static void *one(const char *name, void *a) {
  made_of_one call = (made_of_one)found(name, 0);
  return call ? call(a, version()) : NULL;
}

static void *two(const char *name, int parser, void *a, void *b) {
  made_of_two call = (made_of_two)found(name, parser);
  return call ? call(a, b, version()) : NULL;
}

void *createInferBuilder_INTERNAL(void *logger, int asked) {
  (void)asked;
  return one("createInferBuilder_INTERNAL", logger);
}
void *createInferRuntime_INTERNAL(void *logger, int asked) {
  (void)asked;
  return one("createInferRuntime_INTERNAL", logger);
}
void *createInferRefitter_INTERNAL(void *engine, void *logger, int asked) {
  (void)asked;
  return two("createInferRefitter_INTERNAL", 0, engine, logger);
}
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int asked) {
  (void)asked;
  return two("createNvOnnxParser_INTERNAL", 1, network, logger);
}
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int asked) {
  (void)asked;
  return two("createNvOnnxParserRefitter_INTERNAL", 1, refitter, logger);
}
void *getBuilderPluginRegistry(int capability) {
  by_code call = (by_code)found("getBuilderPluginRegistry", 0);
  return call ? call(capability) : NULL;
}
void *getPluginRegistry(void) {
  pointer call = (pointer)found("getPluginRegistry", 0);
  return call ? call() : NULL;
}
int getNvOnnxParserVersion(void) {
  number call = (number)found("getNvOnnxParserVersion", 1);
  return call ? call() : 0;
}
unsigned char initLibNvInferPlugins(void *logger, const char *domain) {
  (void)logger;
  (void)domain;
  return 1; /* there are none */
}
