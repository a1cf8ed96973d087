/* Archives, through the index and front to back: as they come, and with their
 * digests made right, so that what is changed gets past them.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include <stdlib.h>
#include <string.h>

#include "../unit/archives.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size == 0 ? 1 : size);
    struct qlb_error err;

    memcpy(copy, data, size);
    read_by_index(copy, size, NULL, &err);
    read_by_stream(copy, size, NULL, &err);
    reseal(copy, size);
    read_by_index(copy, size, NULL, &err);
    read_by_stream(copy, size, NULL, &err);
    free(copy);
    return 0;
}
